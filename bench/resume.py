"""Kill a training at random steps, go on from its newest checkpoint, and compare with the one that nobody killed.

    .venv/bin/python -m bench.resume [--kills 20] [--seed 0]

A small Llama-like teacher and half of its layers, by plain forward KL and by a second phase on the student's own answers
with a replay buffer, in turns. Each run is a process of its own (`python -m worker.train`), ended by SIGKILL when it has
told of a random step, which is anywhere between two steps or amid a checkpoint by the time it dies. What must be equal,
to the bit: the student's weights, and the loss of every step, which depends on its samples: none is skipped or repeated.
Exit status 1 if anything differs.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from bench.cases import Entry
from bench.pair_models import MODELS, make_model, make_rows

TEACHER = "llama"
NUMBERS = {"n_epochs": 3, "batch_tokens": 256, "checkpoint_steps": 7, "eval_steps": 1000}
OBJECTIVES: dict[str, Entry] = {
    "forward KL": {"divergence": "forward_kl"},
    "own answers": {
        "divergence": "forward_kl",
        "then": {"divergence": "reverse_kl", "completions": "student"},
    },
}


@dataclass(frozen=True)
class Run:
    """What a run told and left: losses by step, checkpoints by step, and the student's hash if it came to its end."""

    losses: dict[int, float]
    checkpoints: dict[int, Path]
    sha256: str | None

    @property
    def num_steps(self) -> int:
        return max(self.losses)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.resume", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random = Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="still-") as folder:
        task = prepare(Path(folder))
        whole = {
            name: run(task, name, Path(folder) / f"whole-{i}") for i, name in enumerate(OBJECTIVES)
        }
        num_equal = num_odd_steps = 0
        for kill in range(arguments.kills):
            name = list(OBJECTIVES)[kill % len(OBJECTIVES)]
            at = random.randint(1, whole[name].num_steps - 1)
            is_equal, odd = killed_and_resumed(
                task, name, at, Path(folder) / f"kill-{kill}", whole[name]
            )
            num_equal += is_equal
            num_odd_steps += odd
            told = "bit-equal" if is_equal else "DIFFERENT WEIGHTS"
            print(
                f"{kill + 1:3} {name:12} killed after step {at:3}: {told}, {odd} steps with another loss",
                flush=True,
            )
    print(f"{num_equal} of {arguments.kills} bit-equal; {num_odd_steps} steps with another loss")
    return 0 if num_equal == arguments.kills and num_odd_steps == 0 else 1


def prepare(folder: Path) -> Entry:
    """The teacher and its rows."""
    train, valid = make_rows()
    make_model(MODELS[TEACHER], train, folder / TEACHER)
    for name, rows in {"train": train, "valid": valid}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "teacher_dir": str(folder / TEACHER),
        "start_dir": str(folder / TEACHER),
        "training_path": str(folder / "train.jsonl"),
        "validation_path": str(folder / "valid.jsonl"),
        "cache_dir": str(folder / "cache"),
        "num_threads": 1,
    }


def killed_and_resumed(task: Entry, name: str, at: int, out: Path, whole: Run) -> tuple[bool, int]:
    """Whether the student is the same to the bit, and how many steps had another loss."""
    first = run(task, name, out / "first", kill_after=at)
    newest = max(first.checkpoints, default=None)
    resume_dir = None if newest is None else first.checkpoints[newest]
    second = run(task, name, out / "second", resume_dir=resume_dir)
    kept = {step: loss for step, loss in first.losses.items() if step <= (newest or 0)}
    repeated = kept.keys() & second.losses.keys()
    losses = kept | second.losses
    odd = {
        step
        for step in losses.keys() | whole.losses.keys()
        if losses.get(step) != whole.losses.get(step)
    }
    return second.sha256 == whole.sha256, len(odd | repeated)


def run(
    task: Entry,
    name: str,
    out: Path,
    *,
    resume_dir: Path | None = None,
    kill_after: int | None = None,
) -> Run:
    """One process, to its end or until it told of the step."""
    out.mkdir(parents=True)
    spec = {
        **task,
        "distillation": {
            "teacher": TEACHER,
            "student": {"init": "layers", "num_layers": 2},
            "objective": OBJECTIVES[name],
            "hyperparameters": NUMBERS,
            "evaluation": {"metrics": ["perplexity"], "num_samples": 0},
        },
        "resume_dir": None if resume_dir is None else str(resume_dir),
    }
    (out / "spec.json").write_text(json.dumps(spec))
    losses: dict[int, float] = {}
    checkpoints: dict[int, Path] = {}
    sha256 = None
    command = [sys.executable, "-m", "worker.train", str(out / "spec.json"), "--out", str(out)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        for line in lines_of(process.stdout):
            if line["type"] == "metrics" and "train_loss" in line["values"]:
                losses[line["step"]] = line["values"]["train_loss"]
                if line["step"] == kill_after:
                    process.kill()
            elif line["type"] == "checkpoint":
                checkpoints[line["step"]] = out / line["folder"]
            elif line["type"] == "result":
                sha256 = hashlib.sha256(
                    (out / line["folder"] / "model.safetensors").read_bytes()
                ).hexdigest()
            elif line["type"] == "error":
                sys.exit(f"{name}: {line['message']}")
    if kill_after is None and sha256 is None:
        sys.exit(f"{name}: the run ended with {process.returncode} and no result")
    there = {step: folder for step, folder in checkpoints.items() if folder.exists()}
    return Run(losses, there, sha256)


def lines_of(output: Iterator[str]) -> Iterator[Entry]:
    """Whole lines; what a killed process began to write is not one."""
    for line in output:
        if line.endswith("\n"):
            yield json.loads(line)


if __name__ == "__main__":
    sys.exit(main())
