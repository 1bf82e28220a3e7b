"""Compares estimates of jobs with the jobs: three trainings of SmolLM2-135M, each estimated before it runs.

    .venv/bin/python -m bench.estimates [--data-dir DIR] [--json FILE] [--rounds 1] [--job NAME ...]

The rows are made from docstrings of Python's standard library. Memory should be within a factor of 1.2, and time
within 1.5. Nothing else may run on the machine. The first job of a new data folder is estimated from the speed of a
matmul, and later ones from the finished jobs.
"""

import argparse
import importlib
import inspect
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from app.commands.demo import TEACHER, call, import_teacher
from bench.distill import machine
from examples.service import service, upload

Json = dict[str, Any]  # Any: JSON bodies of the public API
MODULES = (
    "argparse", "asyncio", "ast", "bisect", "calendar", "collections", "contextlib", "csv", "datetime", "decimal",
    "difflib", "email.utils", "fnmatch", "fractions", "functools", "gzip", "heapq", "html", "inspect", "io",
    "itertools", "json", "locale", "logging", "math", "os", "pathlib", "pickle", "pprint", "random", "re", "shlex",
    "shutil", "socket", "statistics", "string", "subprocess", "tempfile", "textwrap", "threading", "time", "tokenize",
    "traceback", "types", "unicodedata", "urllib.parse", "uuid", "warnings", "weakref", "zipfile",
)  # fmt: skip
MAX_CHARACTERS = 400
MEMORY_FACTOR, TIME_FACTOR = 1.2, 1.5
POLL_SECONDS = 1.0


def rows() -> list[Json]:
    """Returns questions about functions, with their docstrings as answers."""
    found = []
    for name in MODULES:
        module = importlib.import_module(name)
        for function in sorted(dir(module)):
            text = inspect.getdoc(getattr(module, function)) or ""
            paragraph = text.split("\n\n")[0][:MAX_CHARACTERS]
            if not function.startswith("_") and len(paragraph) > 80 and "(" not in paragraph[:20]:
                asked = f"What does {name}.{function} do in Python?"
                found.append({"prompt": asked, "completion": paragraph})
    return found[:: max(1, len(found) // 240)][:240]


def jobs() -> dict[str, tuple[bool, Json]]:
    """Returns the jobs by name: whether their rows have answers, and the rest of the request."""

    def distillation(**block: Any) -> Json:
        return {
            "model": TEACHER,
            "method": {"type": "distillation", "distillation": {"teacher": TEACHER, **block}},
        }

    return {
        "layers": (
            True,
            distillation(student={"num_layers": 15}, hyperparameters={"n_epochs": 2}),
        ),
        "lora": (
            True,
            {
                "model": TEACHER,
                "method": {"type": "supervised", "supervised": {"lora": {"rank": 8}}},
                "hyperparameters": {"n_epochs": 1},
            },
        ),
        "ladder": (
            False,
            distillation(
                student={"num_layers": [4, 8]},
                data={"max_new_tokens": 32},
                hyperparameters={"n_epochs": 1},
                evaluation={"metrics": ["perplexity", "agreement"], "num_samples": 2},
            ),
        ),
    }


def main() -> int:
    arguments = parse()
    console = Console(width=140)
    report: Json = {"machine": machine(), "jobs": []}
    with tempfile.TemporaryDirectory(prefix="still-", dir="/tmp") as place:
        data_dir = arguments.data_dir or Path(place) / "data"
        with service(data_dir, console) as client:
            import_teacher(client, data_dir, console)
            files = {answered: write_rows(client, answered) for answered in (True, False)}
            first = jobs()[arguments.job[0]]
            wait_for_speed(client, {**first[1], "training_file": files[first[0]]})
            for seed in range(arguments.rounds):
                for name in arguments.job:
                    answered, body = jobs()[name]
                    body = {**body, "training_file": files[answered], "seed": seed}
                    report["jobs"].append({"name": name, **compare(client, body)})
                    console.print_json(json.dumps(report["jobs"][-1]))
                    if arguments.json:
                        arguments.json.write_text(json.dumps(report, indent=1))
    show(console, report["jobs"])
    return 0 if all(is_close(job) for job in report["jobs"]) else 1


def write_rows(client: httpx.Client, answered: bool) -> str:
    """Uploads the rows, with or without their answers, and returns the file's id."""
    made = rows() if answered else [{"prompt": row["prompt"]} for row in rows()[::2]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
        return upload(client, path)


def wait_for_speed(client: httpx.Client, body: Json) -> None:
    """Waits until a train worker has measured its machine."""
    while call(client, "POST", "/v1/fine_tuning/jobs/estimate", json=body)["seconds"] is None:
        time.sleep(POLL_SECONDS)


def compare(client: httpx.Client, body: Json) -> Json:
    """Estimates a job, runs it, and returns both sides."""
    estimate = call(client, "POST", "/v1/fine_tuning/jobs/estimate", json=body)
    job = call(client, "POST", "/v1/fine_tuning/jobs", json=body)
    while (job := call(client, "GET", f"/v1/fine_tuning/jobs/{job['id']}"))["status"] in (
        "queued",
        "running",
    ):
        time.sleep(POLL_SECONDS)
    assert job["status"] == "succeeded", job["error"]
    cost = job["result"]["cost"]
    entries = job["result"].get("ladder") or [job["result"]]
    return {
        "estimate": estimate,
        "actual": {
            "num_rows": job["result"]["num_train_rows"],
            "num_tokens": job["trained_tokens"],
            "num_steps": sum(entry["num_steps"] for entry in entries),
            "total_seconds": job["finished_at"] - job["started_at"],
            "seconds": cost["seconds"],
            "reference_seconds": cost["reference_seconds"],
            "peak_memory_bytes": cost["peak_memory_bytes"],
        },
    }


def factor(job: Json, name: str) -> float:
    """Returns the estimate divided by the actual value of memory or time."""
    estimate, actual = job["estimate"], job["actual"]
    if name == "memory":
        return float(estimate["peak_memory_bytes"] / actual["peak_memory_bytes"])
    return float(estimate["seconds"]["total"] / actual["total_seconds"])


def is_close(job: Json) -> bool:
    limits = (("memory", MEMORY_FACTOR), ("time", TIME_FACTOR))
    return all(1 / most <= factor(job, name) <= most for name, most in limits)


def show(console: Console, found: list[Json]) -> None:
    columns = ("job", "steps", "tokens", "memory, MiB", "factor", "time, s", "factor")
    table = Table(*columns, title="Estimate / actual")
    for job in found:
        estimate, actual = job["estimate"], job["actual"]
        memory, seconds = estimate["peak_memory_bytes"], estimate["seconds"]["total"]
        table.add_row(
            job["name"],
            f"{estimate['num_steps']} / {actual['num_steps']}",
            f"{estimate['num_tokens']:,} / {actual['num_tokens']:,}",
            f"{memory / 2**20:.0f} / {actual['peak_memory_bytes'] / 2**20:.0f}",
            f"{factor(job, 'memory'):.2f}",
            f"{seconds:.0f} / {actual['total_seconds']}",
            f"{factor(job, 'time'):.2f}",
        )
    console.print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="default: a new folder")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--job", nargs="+", choices=sorted(jobs()), default=list(jobs()))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
