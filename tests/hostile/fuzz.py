"""`python -m tests.hostile.fuzz --cases 10000`: schemathesis against a whole running service, until it has sent so many cases.

Writes and prints `{cases, seeds, failures, …}`; status 1 if anything failed.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.e2e.service import TEACHER, Service, start_service
from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]
Json = dict[str, Any]  # Any: a report of schemathesis
# What JSON schema cannot say, we answer with 400: cursors that name nothing, options that exclude each other.
UNFIT_CHECKS = "positive_data_acceptance"
ROUNDS = 40


@dataclass
class Tally:
    """What several runs found."""

    cases: int = 0
    seeds: list[int] = field(default_factory=list)
    phases: dict[str, str] = field(default_factory=dict)
    failures: list[Json] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    def add(self, report: Json, output: str) -> None:
        self.cases += report["test_cases"]["generated"]
        self.seeds.append(report["seed"])
        self.failures += report["failures"] + report["errors"]
        self.phases |= {name: phase["status"] for name, phase in report["phases"].items()}
        if report["failures"] or report["errors"]:
            self.outputs.append(output)


def run_schemathesis(
    url: str, key: str, ids: dict[str, list[str]], seed: int, *options: str
) -> tuple[Json, str]:
    """One run over all routes: its report, and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        words = [
            "--header",
            f"Authorization: Bearer {key}",
            "--seed",
            str(seed),
            "--continue-on-failure",
        ]
        words += [
            "--checks",
            "all",
            "--exclude-checks",
            UNFIT_CHECKS,
            "--warnings",
            "off",
            "--no-color",
        ]
        words += ["--report", "json", "--report-json-path", str(report), *options]
        settings = {"FUZZ_IDS": json.dumps(ids), "SCHEMATHESIS_HOOKS": "tests.hostile.fuzz_hooks"}
        settings["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", *words],
            cwd=folder,
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            check=False,
        )
        output = done.stdout + done.stderr
        if not report.exists():
            raise RuntimeError(f"schemathesis wrote no report:\n{output[-4000:]}")
        return json.loads(report.read_text()), output


def make_objects(client: openai.OpenAI) -> dict[str, list[str]]:
    """One of each kind of object for the ids of the routes: a paused job, its file, a batch, an alias, an import."""
    rows = "".join(
        json.dumps({"prompt": f"Ask {i}", "completion": "Answer."}) + "\n" for i in range(6)
    )
    file = client.files.create(file=("rows.jsonl", io.BytesIO(rows.encode())), purpose="fine-tune")
    line: Json = {"custom_id": "a", "method": "POST", "url": "/v1/completions"}
    line |= {"body": {"model": TEACHER, "prompt": "Hello", "max_tokens": 2}}
    asked = client.files.create(
        file=("asked.jsonl", io.BytesIO(json.dumps(line).encode())), purpose="batch"
    )
    method: Any = {
        "type": "distillation",
        "distillation": {"teacher": TEACHER, "student": {"num_layers": 2}},
    }
    job = client.fine_tuning.jobs.create(model=TEACHER, training_file=file.id, method=method)
    client.fine_tuning.jobs.pause(job.id)
    batch = client.batches.create(
        input_file_id=asked.id, endpoint="/v1/completions", completion_window="24h"
    )
    brought = client.post(
        "/models/import", body={"source": "hf:none/none", "name": "none"}, cast_to=httpx.Response
    ).json()
    client.put(f"/models/{TEACHER}/aliases/live", body={"model": TEACHER}, cast_to=object)
    endpoint = client.webhooks.create(
        name="fuzz", url="http://127.0.0.1:9/", event_types=["batch.cancelled"]
    )
    return {
        "model": [TEACHER, f"{TEACHER}@live"],
        "model_id": [TEACHER, f"{TEACHER}@live"],
        "file_name": ["config.json", "model.safetensors"],
        "teacher": [TEACHER],
        "name": [TEACHER],
        "file_id": [file.id, asked.id],
        "training_file": [file.id],
        "validation_file": [file.id],
        "input_file_id": [asked.id],
        "job_id": [job.id, brought["id"]],
        "batch_id": [batch.id],
        "webhook_endpoint_id": [endpoint.id],
    }


def fuzz(service: Service, *, cases: int, seed: int, max_examples: int) -> Tally:
    """Runs with one seed after the other until there were so many cases."""
    ids = make_objects(service.client())
    tally = Tally()
    for number in range(ROUNDS):
        if tally.cases >= cases:
            break
        report, output = run_schemathesis(
            service.url, service.key, ids, seed + number, "--max-examples", str(max_examples)
        )
        tally.add(report, output)
        print(
            f"seed {seed + number}: {tally.cases} cases, {len(tally.failures)} kinds of failure",
            flush=True,
        )
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.fuzz")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-examples", type=int, default=60)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="still-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        service = start_service(Path(folder) / "data", **QUIET)
        try:
            save_tiny(Path(folder) / "tiny", "llama")
            service.cli("models", "import", str(Path(folder) / "tiny"), "--name", TEACHER)
            tally = fuzz(
                service,
                cases=arguments.cases,
                seed=arguments.seed,
                max_examples=arguments.max_examples,
            )
        finally:
            status = service.stop()
    result = {
        "cases": tally.cases,
        "seeds": tally.seeds,
        "phases": tally.phases,
        "failures": tally.failures,
    }
    result |= {"seconds": round(time.monotonic() - began), "exit_status_of_the_service": status}
    print("\n".join(tally.outputs))
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    return 1 if tally.failures or status else 0


# Jobs that schemathesis makes may run, but not for long, and nothing is fetched from or sent to anywhere.
QUIET = {
    "STILLHOUSE_HF_ENDPOINT": "http://127.0.0.1:9",
    "STILLHOUSE_MAX_RUNTIME_SECONDS": "60",
    "STILLHOUSE_WEBHOOK_ALLOWED_HOSTS": "127.0.0.1",
}

if __name__ == "__main__":
    sys.exit(main())
