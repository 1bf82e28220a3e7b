"""`stillhouse` against a running service: each command of docs/cli.md, on a terminal and off it."""

import fcntl
import io
import json
import os
import pty
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from app.commands.cli import main
from tests.documentation import DOCS, code_blocks, sections
from tests.e2e.service import TEACHER, Service
from tests.losing_proxy import LosingProxy

pytestmark = pytest.mark.e2e
DOCUMENT = DOCS / "cli.md"
CONTROL = "Control a job"
WATCH = "stillhouse jobs watch $JOB"
SUPERVISED = f"stillhouse jobs create --supervised --model {TEACHER} --training-file answers.jsonl"
FAST_METHOD = {
    "data": {"max_new_tokens": 4, "temperature": 0.0},
    "hyperparameters": {"n_epochs": 1, "batch_tokens": 512, "max_sequence_tokens": 96},
    "evaluation": {"metrics": ["perplexity", "agreement"], "num_samples": 1},
}
Json = dict[str, Any]  # Any: JSON bodies of the public API


@dataclass(frozen=True)
class Printed:
    """What a command printed, and its exit status."""

    status: int
    out: str
    err: str


Run = Callable[..., Printed]


@pytest.fixture
def run(
    service: Service,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Run:
    """A function that runs `stillhouse` in this process, in an empty folder, without a terminal."""
    monkeypatch.setenv("STILLHOUSE_URL", service.url)
    monkeypatch.setenv("STILLHOUSE_API_KEY", service.key)
    monkeypatch.chdir(tmp_path)

    def do_run(*words: str, stdin: str = "") -> Printed:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            main(words)
        out, err = capsys.readouterr()
        code = ended.value.code
        return (
            Printed(1, out, f"{err}{code}")
            if isinstance(code, str)
            else Printed(int(code or 0), out, err)
        )

    return do_run


def write_rows(folder: Path) -> None:
    """Writes the files that docs/cli.md names."""
    rows: dict[str, list[Json]] = {
        "prompts.jsonl": [{"prompt": f"What is number {n}?"} for n in range(12)],
        "answers.jsonl": [{"prompt": f"What is {n}?", "completion": "A jar."} for n in range(12)],
        "requests.jsonl": [
            {
                "custom_id": str(n),
                "method": "POST",
                "url": "/v1/completions",
                "body": {"model": TEACHER, "prompt": "The still", "max_tokens": 4},
            }
            for n in range(2)
        ],
    }
    for name, lines in rows.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


@contextmanager
def suspended(service: Service, role: str) -> Iterator[None]:
    """Stops the worker of a role, so that it takes no work."""
    processes = service.processes("worker.main", role)
    assert processes
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


class Shell:
    """Runs the commands of a document: `stillhouse`, `export`, variables, `echo` and `jq -r`."""

    def __init__(self, run: Run) -> None:
        self.run, self.variables, self.printed = run, dict[str, str](), dict[str, Printed]()

    def __call__(self, line: str) -> None:
        if line.startswith("export "):
            return
        assigned = re.fullmatch(r"(\w+)=\$\((.+)\)", line)
        command = assigned[2] if assigned else line
        command, _, field = command.partition(" | jq -r .")
        stdin = ""
        if piped := re.fullmatch(r'echo "(.+)" \| (.+)', command):
            stdin, command = piped[1] + "\n", piped[2]
        name, *words = [self._expanded(word) for word in shlex.split(command)]
        assert name == "stillhouse", line
        done = self.printed[line] = self.run(*words, stdin=stdin)
        assert done.status == 0, (line, done)
        assert "Traceback" not in done.err
        if assigned:
            self.variables[assigned[1]] = (
                str(json.loads(done.out)[field]) if field else done.out.strip()
            )

    def _expanded(self, word: str) -> str:
        return re.sub(r"\$(\w+)", lambda match: self.variables[match[1]], word)


def documented() -> list[tuple[str, list[str]]]:
    """Returns the headings of docs/cli.md with the commands in their code blocks."""
    return [
        (heading, [line for block in code_blocks(text, "sh") for line in block.code.splitlines()])
        for heading, text in sections(DOCUMENT.read_text())
    ]


def test_every_command_of_the_documentation_works(
    service: Service, run: Run, tmp_path: Path
) -> None:
    write_rows(tmp_path)
    shell = Shell(run)
    for heading, lines in documented():
        if heading == "Shell completion":  # it would change the home folder
            continue
        with ExitStack() as stack:
            if heading == CONTROL:  # the job must neither run nor end
                stack.enter_context(suspended(service, "train"))
                finished = shell.variables["JOB"]
                shell(f"JOB=$({SUPERVISED})")
            if heading == "Batches":
                stack.enter_context(suspended(service, "serve"))
            for line in lines:
                if line.startswith("stillhouse jobs create"):
                    create_and_cancel(service, shell, tiny(line))
                elif line == WATCH:
                    watch_twice(service, shell)
                else:
                    shell(fitted(line))
        if heading == CONTROL:
            shell.variables["JOB"] = finished
    check(shell, tmp_path)


def create_and_cancel(service: Service, shell: Shell, line: str) -> None:
    """Runs a command that creates a job, but not the job."""
    with suspended(service, "train"):
        shell(f"OTHER=$({line})")
        show = "stillhouse jobs show $OTHER --json"
        shell(show)
        if given := re.search(r"--method-json '(.*)'", line):
            method = json.loads(shell.printed[show].out)["method"]["distillation"]
            assert includes(method, json.loads(given[1]))
        shell("stillhouse jobs cancel $OTHER")


def includes(document: Json, part: Json) -> bool:
    """Returns whether all values of `part` are in the document, at the same places."""
    return all(
        includes(document[key], value) if isinstance(value, dict) else document[key] == value
        for key, value in part.items()
    )


def watch_twice(service: Service, shell: Shell) -> None:
    """Follows the job on a terminal and off it at the same time, while it runs."""
    terminal = Terminal(service, "jobs", "watch", shell.variables["JOB"])
    shell(WATCH)
    terminal.expect("━━━━")  # the bar, while the job runs
    terminal.expect(r"\d\d:\d\d:\d\d\S*  loading models.*  succeeded")
    terminal.expect(r"status.*\x1b\[32msucceeded")  # green
    terminal.expect("untrained.*student.*agreement")
    assert terminal.end() == 0


def tiny(line: str) -> str:
    """Returns a command of the documentation for a tiny model."""
    return line.replace("my-teacher", TEACHER).replace("--layers 8", "--layers 2")


def fitted(line: str) -> str:
    """Returns a command of the documentation for a tiny model, with a job of a few seconds."""
    line = tiny(line)
    if "jobs create --teacher" in line:
        fast = shlex.quote(json.dumps(FAST_METHOD))
        line = line.removesuffix(")") + f" --method-json {fast}" + (")" if line[-1] == ")" else "")
    return line


def check(shell: Shell, folder: Path) -> None:
    """Checks what the commands of the documentation printed."""
    out = {line: done.out for line, done in shell.printed.items()}
    watched = out["stillhouse jobs watch $JOB"]
    assert "\x1b" not in watched
    assert re.search(r"^\d\d:\d\d:\d\d  loading models", watched, re.MULTILINE)
    assert re.search(r"^\d\d:\d\d:\d\d  succeeded  100%$", watched, re.MULTILINE)
    assert re.search(r"^student +ds:tiny-llama:faq:", watched, re.MULTILINE)
    assert re.search(r"agreement, top token +100\.0% +\d", watched)
    listed = out["stillhouse jobs list --metadata team=support"].splitlines()
    assert listed[0].split() == ["ID", "STATUS", "PROGRESS", "MODEL", "STUDENT", "CREATED"]
    assert [line.split()[0] for line in listed[1:]] == [shell.variables["JOB"]]
    events = out["stillhouse jobs events $JOB --follow"].splitlines()
    assert "Created fine-tuning job" in events[0]
    assert events[-1].endswith("The job has successfully completed")
    assert out["stillhouse jobs events $JOB --limit 5"].splitlines() == events[-5:]
    assert (folder / "copy.jsonl").read_bytes() == (folder / "prompts.jsonl").read_bytes()
    assert (folder / "copy" / "model.safetensors").exists()
    assert json.loads(out["stillhouse jobs list --limit 1 --json"])["has_more"] is True
    lines = out["stillhouse jobs list --all --json"].splitlines()
    assert shell.variables["JOB"] in [json.loads(line)["id"] for line in lines]
    rolled_back = out["stillhouse models alias rollback faq@live"]
    assert rolled_back == f"faq@live points at {TEACHER}\n"
    chats = [json.loads(text) for line, text in out.items() if line.startswith("echo")]
    assert chats[0]["usage"]["completion_tokens"] > 0


class Terminal:
    """A `stillhouse` command on a terminal of its own, 100 columns wide."""

    def __init__(self, service: Service, *words: str, **variables: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        address = {"STILLHOUSE_URL": service.url, "STILLHOUSE_API_KEY": service.key}
        self.process = subprocess.Popen(
            # A suite that runs in the background of a shell ignores Ctrl-C, and so would the command.
            ["env", "--default-signal=INT", sys.executable, "-m", "app.commands.cli", *words],
            env={**os.environ, "TERM": "xterm-256color", **address, **variables},
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        self.shown = ""

    def expect(self, pattern: str, seconds: float = 240) -> str:
        """Waits for text that matches, and returns all that was shown before and with it."""
        deadline = time.monotonic() + seconds
        while (match := re.search(pattern, self.shown, re.DOTALL)) is None:
            assert time.monotonic() < deadline, self.shown
            assert self._read(deadline - time.monotonic()), f"{pattern!r} missing: {self.shown}"
        before = self.shown[: match.end()]
        self.shown = self.shown[match.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self) -> int:
        """Returns the exit status, after all output has been read."""
        while self._read(90):
            pass
        os.close(self.master)
        return self.process.wait(60)

    def _read(self, seconds: float) -> bool:
        """Reads what is there. Returns False at the end of the output."""
        assert select.select([self.master], [], [], seconds)[0], self.shown
        try:
            piece = os.read(self.master, 65536)
        except OSError:  # the last process with the terminal has ended
            return False
        self.shown += piece.decode(errors="replace")
        return bool(piece)


def test_ctrl_c_leaves_the_job_and_says_how_to_come_back(
    service: Service, run: Run, tmp_path: Path
) -> None:
    write_rows(tmp_path)
    with suspended(service, "train"):
        command = [*shlex.split(SUPERVISED)[1:-1], str(tmp_path / "answers.jsonl"), "--watch"]
        terminal = Terminal(service, *command, NO_COLOR="1")
        shown = terminal.expect(r"place \d+ of \d+")
        assert "Uploaded answers.jsonl as file-" in shown
        assert not re.search(r"\x1b\[[0-9;]*3[1-7]m", shown)  # no colour
        terminal.process.send_signal(signal.SIGINT)
        told = terminal.expect(r"The job goes on.*stillhouse jobs watch ftjob-\w+")
        job_id = told.rpartition(" ")[2]
        assert terminal.end() == 130
        assert run("jobs", "cancel", job_id).out == f"{job_id} is cancelled\n"
    watched = run("jobs", "watch", job_id, "--json")
    assert (watched.status, json.loads(watched.out)["status"]) == (1, "cancelled")
    assert "the job was cancelled" in watched.err
    asked = Terminal(service, "jobs", "delete", job_id)
    asked.expect("Delete the job")
    asked.type("y\n")
    asked.expect(f"Deleted {job_id}")
    assert asked.end() == 0


def test_a_conversation_remembers_its_messages_until_they_are_cleared(service: Service) -> None:
    with closing(LosingProxy(service.url, 0)) as proxy:
        terminal = Terminal(
            service, "chat", TEACHER, "--max-tokens", "4", "--temperature", "0", "--system", "Brief.",
            STILLHOUSE_URL=proxy.url,
        )  # fmt: skip
        terminal.expect("> ")
        answers = []
        for question in ("What is a lantern?", "Who keeps it?"):
            terminal.type(f"{question}\n")
            answers.append(answer_in(terminal.expect(r"(\d+) tokens in .*> ")))
        terminal.type("/clear\n")
        terminal.expect(r"The messages are forgotten\..*> ")
        terminal.type("What is a lantern?\n")
        answers.append(answer_in(terminal.expect(r"(\d+) tokens in .*> ")))
        terminal.type("\x04")  # Ctrl-D
        assert terminal.end() == 0
        sent = messages_in(b"".join(proxy.requests))
    system = {"role": "system", "content": "Brief."}
    first, second = (
        {"role": "user", "content": question}
        for question in ("What is a lantern?", "Who keeps it?")
    )
    assert [[message["content"] for message in messages[:2]] for messages in sent] == 3 * [
        ["Brief.", "What is a lantern?"]
    ]
    assert sent[0] == sent[2] == [system, first]
    assert sent[1][1:2] + sent[1][3:] == [first, second]
    assert sent[1][2]["role"] == "assistant"
    assert sent[1][2]["content"].strip() == answers[0] == answers[2] != ""


def messages_in(requests: bytes) -> list[list[Json]]:
    """Returns the messages of each chat request among HTTP requests."""
    bodies = [part.partition(b"\r\n\r\n")[2] for part in requests.split(b"POST /v1/chat/")[1:]]
    return [json.JSONDecoder().raw_decode(body.decode())[0]["messages"] for body in bodies]


def answer_in(shown: str) -> str:
    """Returns the answer after the echo of the question."""
    match = re.search(r"\?[^\n]*\n(.*?)\r?\n[^\n]*tokens in", shown, re.DOTALL)
    assert match is not None, shown
    return re.sub(r"\x1b\[[?0-9;]*[a-z]", "", match[1]).strip()


def test_errors_of_the_service_are_shown_with_what_to_do(
    service: Service, run: Run, tmp_path: Path
) -> None:
    unknown = run("jobs", "show", "ftjob-none")
    assert (unknown.status, unknown.out) == (1, "")
    assert unknown.err.startswith("stillhouse: ")
    assert "(HTTP 404)" in unknown.err
    wrong = run("models", "list", "--key", "sk-sh-none")
    assert (wrong.status, "set STILLHOUSE_API_KEY, or give --key" in wrong.err) == (1, True)
    limited = service.new_key("cli", "models:read")
    refused = run("files", "list", "--key", limited)
    assert (refused.status, "files:read" in refused.err) == (1, True)
    (tmp_path / "wrong.jsonl").write_text("not JSON\n")
    rows = run("files", "upload", "wrong.jsonl")
    assert (rows.status, "line 1" in rows.err) == (1, True)
    batch = run("batches", "create", "wrong.jsonl")
    assert (batch.status, "line 1" in batch.err) == (1, True)
    assert run("jobs", "watch", "ftjob-none").status == 1
    stranger = run("chat", "none", "Hello")
    assert (stranger.status, stranger.out) == (1, "")
    assert run("models", "serve", "none").status == 1


def test_a_service_that_does_not_answer_ends_1(run: Run) -> None:
    done = run("files", "list", "--url", "http://127.0.0.1:9")
    assert (done.status, done.out) == (1, "")
    assert "does not answer" in done.err
    assert "is the service running?" in done.err


def test_watching_a_job_that_does_not_succeed_ends_1_with_the_reason(
    service: Service, run: Run, tmp_path: Path
) -> None:
    write_rows(tmp_path)
    with suspended(service, "train"):
        job_id = run(*shlex.split(SUPERVISED)[1:]).out.strip()
        assert run("jobs", "pause", job_id).status == 0
        paused = run("jobs", "watch", job_id)
        assert (paused.status, f"stillhouse jobs resume {job_id}" in paused.err) == (1, True)
        assert run("jobs", "cancel", job_id).status == 0
    impossible = {**FAST_METHOD, "evaluation": {"gate": {"metric": "agreement", "at_least": 1.0}}}
    failed = run(
        "jobs", "create", "--teacher", TEACHER, "--training-file", "prompts.jsonl", "--layers", "2",
        "--method-json", json.dumps(impossible), "--watch",
    )  # fmt: skip
    assert (failed.status, "the job failed: " in failed.err) == (1, True), failed


def test_files_that_cannot_be_read_or_written_are_errors_of_one_line(
    run: Run, tmp_path: Path
) -> None:
    write_rows(tmp_path)
    file_id = run("files", "upload", "prompts.jsonl").out.strip()
    long = "x" * 300
    for target in ("prompts.jsonl", f"absent/{long}", "prompts.jsonl/below", long):
        done = run("files", "download", file_id, "--output", target)
        assert (done.status, done.out) == (1, ""), done
        (line,) = done.err.splitlines()
        assert line.startswith("stillhouse: ")
    named = run("batches", "create", long)
    assert (named.status, "cannot read" in named.err) == (2, True)


@pytest.mark.parametrize(
    "words",
    [
        ["jobs", "create", "--teacher", "t", "--training-file", "absent.jsonl"],
        ["jobs", "list", "--limit", "0"],
        ["models", "alias", "show", "no-alias"],
        ["usage", "--start", "yesterday"],
        ["generate", "m", "-"],
        ["files", "delete", "file-1"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_ends_2(run: Run, words: list[str]) -> None:
    done = run(*words)
    assert (done.status, done.out) == (2, "")
    assert done.err
