"""Trains every kind of student from every kind of teacher, each as a job through the API of a service.

    .venv/bin/python -m bench.pairs [--only PAIR ...]

Makes small teachers, imports them and uploads rows. It then runs one job per pair with the `openai` client and asks each
student a question. The table is written below the heading "Figures" of docs/pairs.md; with --only it is printed.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import torch
from openai.types.fine_tuning import FineTuningJob
from rich.console import Console

from app.commands.demo import running_service
from bench.cases import Entry
from bench.distill import machine
from bench.pair_models import MODELS, make_model, make_rows

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "pairs.md"
HEADING = "## Figures"
NUM_WORKERS = 2  # jobs at a time, with a thread each: such small models use no more
MAX_ANSWER_TOKENS = 32
JOB_SECONDS = 900
FRESH = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_positions": 256}


@dataclass(frozen=True)
class Pair:
    """One job: its teacher, the start of its student, and the blocks of the request that differ."""

    teacher: str
    student: Entry
    start: str | None = None
    signal: str = "auto"
    n_epochs: int = 20
    data: Entry = field(default_factory=dict)

    @property
    def model(self) -> str:
        return self.start or self.teacher

    @property
    def kind(self) -> str:
        """Description of the student."""
        init = self.student["init"]
        if init == "fresh":
            return f"{self.student['config']['family']}, fresh"
        sizes = {name: size for name, size in self.student.items() if isinstance(size, int)}
        words = ", ".join(f"{name.removeprefix('num_')} {size}" for name, size in sizes.items())
        return f"{self.model}, {init}" + (f" ({words})" if words else "")

    @property
    def name(self) -> str:
        """`bert-bloom-hidden`: for the command line."""
        kind = self.student.get("config", {}).get("family") or self.student["init"]
        return "-".join([self.teacher, kind, *([] if self.signal == "auto" else [self.signal])])


def fresh(family: str) -> Entry:
    return {"init": "fresh", "config": {"family": family, **FRESH}}


FAMILIES = ("t5", "bloom", "encoder-decoder")
PAIRS = [
    *(Pair("gpt2", fresh(family)) for family in FAMILIES),
    *(
        Pair(teacher, fresh(family), signal=signal)
        for teacher in ("bert", "roberta")
        for signal in ("conditional_mlm", "hidden")
        for family in FAMILIES
    ),
    Pair("t5", {"init": "layers", "num_decoder_layers": 2, "num_encoder_layers": 2}),
    Pair("bloom", {"init": "layers", "num_layers": 2}),
    Pair("llama", {"init": "layers", "num_layers": 2}),
    Pair("bert2bert", {"init": "layers", "num_decoder_layers": 1}),
    Pair("gpt2", {"init": "width", "hidden_size": 48, "num_heads": 2}),
    Pair("t5", {"init": "width", "hidden_size": 48, "num_heads": 2}),
    Pair("llama", {"init": "lora", "lora": {"rank": 8}}, start="llama-beginner"),
    Pair("llama", {"init": "checkpoint"}, start="gpt2-other-words", signal="uld"),
    Pair(
        "llama",
        {"init": "checkpoint"},
        start="t5-other-words",
        signal="text",
        data={"temperature": 0.0},
    ),
]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.pairs")
    names = [pair.name for pair in PAIRS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PAIR")
    asked = parser.parse_args().only
    pairs = [pair for pair in PAIRS if pair.name in asked]
    began, load = time.monotonic(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="still-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)  # Postgres may run as another user
        lines, num_failed = measure(pairs, Path(folder), Console())
    text = "\n".join([*heading(time.monotonic() - began, load), *lines]) + "\n"
    print(text)
    if asked == names:
        DOCUMENT.write_text(DOCUMENT.read_text().split(HEADING)[0] + text)
    return 1 if num_failed else 0


def measure(pairs: list[Pair], folder: Path, console: Console) -> tuple[list[str], int]:
    """Lines of the table, and how many jobs failed."""
    train, held_out = make_rows()
    names = sorted({name for pair in pairs for name in (pair.teacher, pair.model)})
    make_models(names, train, folder / "models", console)
    # Read by the service, which this process starts.
    os.environ["STILLHOUSE_NUM_THREADS"] = "1"
    data_dir = folder / "data"
    with running_service(data_dir, console, "--train-workers", str(NUM_WORKERS)) as http:
        import_models(names, folder / "models", data_dir)
        key = (data_dir / "api_key").read_text().strip()
        with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key=key) as client:
            return run_jobs(client, pairs, train, held_out, console)


def make_models(names: list[str], rows: list[Entry], folder: Path, console: Console) -> None:
    torch.set_num_threads(1)
    for name in names:
        if (folder / name).exists():
            continue
        began = time.monotonic()
        loss = make_model(MODELS[name], rows, folder / name)
        console.print(f"{name}: loss {loss:.3f} after {time.monotonic() - began:.0f} s")


def import_models(names: list[str], folder: Path, data_dir: Path) -> None:
    """All at once: the service's workers take them one by one."""
    command = [sys.executable, "-m", "app.commands.cli", "models", "import"]
    imports = [
        subprocess.Popen(
            [*command, str(folder / name), "--name", name, "--data-dir", str(data_dir)],
            stdout=subprocess.DEVNULL,
        )
        for name in names
    ]
    for name, process in zip(names, imports, strict=True):
        if process.wait():
            raise RuntimeError(f"{name} could not be imported; see the error above")


def run_jobs(
    client: openai.OpenAI,
    pairs: list[Pair],
    train: list[Entry],
    held_out: list[Entry],
    console: Console,
) -> tuple[list[str], int]:
    files = [upload(client, name, rows) for name, rows in (("train", train), ("valid", held_out))]
    jobs = [submit(client, pair, files) for pair in pairs]
    question = held_out[0]
    lines = [
        f'The last column is the answer to "{question["prompt"]}", which no student was trained on; the row\'s own '
        f'completion is "{question["completion"]}". KL and agreement are to the teacher\'s distributions, ROUGE-L to its '
        "greedy answers; * to the rows' own completions, for a masked teacher writes none.",
        "",
        "| teacher | student | signal | parameters | KL | perplexity | agreement | ROUGE-L | seconds | answers |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    num_failed = 0
    for pair, job_id in zip(pairs, jobs, strict=True):
        job = wait(client, job_id)
        console.print(f"{pair.name}: {job.status} {job.error.message if job.error else ''}")
        if job.status == "succeeded":
            lines.append(
                row_of(pair, job, ask(client, str(job.fine_tuned_model), question["prompt"]))
            )
        else:
            num_failed += 1
            why = job.error.message if job.error else job.status
            lines.append(
                f"| {pair.teacher} | {pair.kind} | {pair.signal} | failed: {why} |" + " |" * 6
            )
    return lines, num_failed


def upload(client: openai.OpenAI, name: str, rows: list[Entry]) -> str:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return client.files.create(file=(f"{name}.jsonl", content), purpose="fine-tune").id


def submit(client: openai.OpenAI, pair: Pair, files: list[str]) -> str:
    method: Any = {  # Any: the SDK's types know no distillation method
        "type": "distillation",
        "distillation": {
            "teacher": pair.teacher,
            "student": pair.student,
            "objective": {"teacher_signal": pair.signal},
            "data": {"max_new_tokens": MAX_ANSWER_TOKENS, **pair.data},
            "hyperparameters": {
                "n_epochs": pair.n_epochs,
                "batch_tokens": 512,
                "learning_rate": 2e-3,
                "max_sequence_tokens": 128,
            },
            "evaluation": {"metrics": ["perplexity", "agreement", "rouge_l"], "num_samples": 1},
        },
    }
    job = client.fine_tuning.jobs.create(
        model=pair.model,
        training_file=files[0],
        validation_file=files[1],
        suffix=pair.name[:18].strip("-"),
        seed=0,
        method=method,
    )
    return job.id


def wait(client: openai.OpenAI, job_id: str) -> FineTuningJob:
    deadline = time.monotonic() + JOB_SECONDS
    while time.monotonic() < deadline:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status not in ("validating_files", "queued", "running"):
            return job
        time.sleep(0.5)
    raise TimeoutError(f"{job_id} is {job.status} after {JOB_SECONDS} s")


def ask(client: openai.OpenAI, model: str, question: str) -> str:
    answer = client.completions.create(
        model=model, prompt=question, max_tokens=MAX_ANSWER_TOKENS, temperature=0
    )
    return answer.choices[0].text.strip()


def row_of(pair: Pair, job: FineTuningJob, answer: str) -> str:
    result: Entry = job.model_dump()["result"]
    teacher, before, after = result["teacher"], result["untrained"], result["student"]

    def course(name: str, form: str = "{:.2f}") -> str:
        if after.get(name) is None:
            return "–"
        return f"{form.format(before[name])} → {form.format(after[name])}"

    # A masked teacher writes nothing to be compared with.
    rouge = (
        f"{after['rouge_l']:.2f}" if "rouge_l" in after else f"{after['rouge_l_reference']:.2f} *"
    )
    cells = [
        pair.teacher,
        pair.kind,
        result["teacher_signal"],
        f"{teacher['num_parameters'] / 1000:,.0f}k → {after['num_parameters'] / 1000:,.0f}k",
        course("kl"),
        course("perplexity"),
        course("agreement", "{:.0%}"),
        rouge,
        f"{result['train_seconds']:.0f}",
        answer.replace("|", "\\|").replace("\n", " ") or "(nothing)",
    ]
    return f"| {' | '.join(cells)} |"


def heading(seconds: float, load: float) -> list[str]:
    where = machine()
    today = datetime.datetime.now(datetime.UTC).date()
    return [
        HEADING,
        "",
        f"{today}, {where['cpu']}, {where['num_cpus']} cores, torch {torch.__version__}; "
        f"`.venv/bin/python -m bench.pairs` took {seconds / 60:.1f} minutes, {NUM_WORKERS} jobs at a time, "
        f"one thread each; load of the machine when it began: {load:.1f}.",
        'One seed, small teachers trained for seconds on 336 rows of "who owns the lantern?" and the like: the figures '
        "show that a pair works, not how well it does on your data.",
        "",
    ]


if __name__ == "__main__":
    sys.exit(main())
