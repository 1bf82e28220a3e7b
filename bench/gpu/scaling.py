"""Training of one student by one process and by two, each on its own GPU."""

import json
import subprocess
import sys
from pathlib import Path

from bench.children import ROOT, ChildFailed
from bench.gpu.models import Json
from bench.gpu.sizes import Sizes
from bench.gpu.whole_run import run_spec

TIMEOUT_SECONDS = 240.0
LAST_CHARACTERS = 2000
NUM_STEPS, TOY_STEPS = 40, 4


def measure_scaling(work: Path, student_dir: Path, sizes: Sizes) -> Json:
    """Returns tokens per second with one process and with two, and their ratio."""
    rates = {count: rate_of(work / str(count), student_dir, sizes, count) for count in (1, 2)}
    return {
        "tokens_per_second": {str(count): round(rate, 1) for count, rate in rates.items()},
        "ratio": round(rates[2] / rates[1], 3),
    }


def rate_of(work: Path, student_dir: Path, sizes: Sizes, num_processes: int) -> float:
    """Runs the training process and returns the tokens per second of its steps.

    Layer fitting, teacher, evaluation and checkpoints are left out. Raises ChildFailed.
    """
    num_steps = TOY_STEPS if sizes.is_toy else NUM_STEPS
    spec = run_spec(work, student_dir, sizes, num_steps=num_steps, num_processes=num_processes)
    path = work / "spec.json"
    path.write_text(spec.model_dump_json())
    command = [sys.executable, "-m", "worker.train", str(path), "--out", str(work / "out")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )
    if done.returncode:
        raise ChildFailed(f"{' '.join(command[1:3])} failed: {done.stderr[-LAST_CHARACTERS:]}")
    line = json.loads(done.stdout.splitlines()[-1])
    seconds: float = line["result"]["cost"]["seconds"]["training"]
    return float(line["trained_tokens"]) / seconds
