"""Checks a GPU: tests, training steps, memory, a whole run, and other libraries if installed.

    .venv/bin/python bench/gpu_check.py [--json FILE] [--part NAME ...] [--toy] [--work FOLDER]

`make gpu-check` runs it, in about ten minutes. Weights are random, and nothing is downloaded. The exit status is 0 if
all figures are within their bounds (bench/gpu/thresholds.py), 1 if one is not or a part failed, and 2 without a GPU, so
that nobody takes that for a check that passed. `--toy` runs every part at toy sizes on a CPU, without bounds on speed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers.utils.logging import disable_progress_bar

from bench.children import ROOT
from bench.gpu.decode_graphs import compare_graphs
from bench.gpu.engines import compare_services, measure_engine
from bench.gpu.losses import measure_losses
from bench.gpu.memory import release
from bench.gpu.models import Json, save_models
from bench.gpu.peak_speed import measured_tflops, peak_tflops
from bench.gpu.scaling import measure_scaling
from bench.gpu.sizes import FULL, TOY, Sizes
from bench.gpu.steps import measure_steps
from bench.gpu.thresholds import checks_of
from bench.gpu.trl_step import measure_trl
from bench.gpu.whole_run import measure_whole_run
from worker.distill.training.devices import Device, find_device

TEST_SECONDS = 360
PARTS = ("tests", "steps", "losses", "whole_run", "trl", "engine", "graphs", "services", "scaling")
NO_GPU = 2


def main() -> int:
    """Runs the parts and returns the exit status."""
    arguments = parse()
    if arguments.toy:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    device = find_device()
    if device.name == "cpu" and not arguments.toy:
        print("there is no CUDA device, so nothing was checked")
        return NO_GPU
    report: Json = {
        "card": device.card or "CPU",
        "driver": driver(),
        "torch": torch.__version__,
        "is_toy": arguments.toy,
    }
    print(f"{report['card']}, driver {report['driver']}, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        report |= measure(Path(work), device, arguments)
    checks = [] if arguments.toy else checks_of(report)
    report["checks"] = [str(check) for check in checks]
    print("", *report["checks"], sep="\n", flush=True)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1))
    has_failed = report["failed"] or any(not check.has_passed for check in checks)
    return 1 if has_failed else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/gpu_check.py", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="only these")
    parser.add_argument("--toy", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--work", type=Path, help="folder for models; needs 60 GB without --toy")
    return parser.parse_args()


def measure(work: Path, device: Device, arguments: argparse.Namespace) -> Json:
    """Runs each part, prints its figures, and goes on if one fails. `failed` has the errors."""
    disable_progress_bar()
    sizes = TOY if arguments.toy else FULL
    dtype = device.autocast or torch.float32
    measured = measured_tflops(device.name, dtype, is_toy=arguments.toy)
    peak = peak_tflops(device.card, measured)
    begun = time.monotonic()
    folders = save_models(work, sizes, device.name)
    seconds = {"save_models": round(time.monotonic() - begun, 1)}
    student = folders[1]
    parts: dict[str, Callable[[], object]] = {
        "tests": run_tests,
        "steps": lambda: measure_steps(work / "steps", folders, sizes, device, peak),
        "losses": lambda: measure_losses(sizes, device.name),
        "whole_run": lambda: measure_whole_run(work / "run", student, sizes, device),
        "trl": lambda: measure_trl(work / "trl", folders, sizes, device.name),
        "engine": lambda: measure_engine(student, sizes, device.name),
        "graphs": lambda: compare_graphs(student, sizes, device.name, device.card),
        "services": lambda: compare_services(work, student, sizes),
        "scaling": lambda: scale(work / "scaling", student, sizes),
    }
    report: Json = {"measured_tflops": round(measured, 2), "peak_tflops": peak, "failed": {}}
    for name in arguments.part:
        begun = time.monotonic()
        try:
            report[name] = parts[name]()
        except Exception as error:  # noqa: BLE001  # the other parts still give their figures
            report["failed"][name] = traceback.format_exc()
            print(f"{name} FAILED: {error}", flush=True)
        else:
            seconds[name] = round(time.monotonic() - begun, 1)
            show(name, report[name])
        finally:
            release(device.name)  # later parts may run in other processes
    return report | {"seconds": seconds}


def run_tests() -> Json:
    """Runs the tests that need a GPU. Raises CalledProcessError if some fail."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
    subprocess.run(command, cwd=ROOT, timeout=TEST_SECONDS, check=True)
    return {"status": 0}


def scale(work: Path, student: Path, sizes: Sizes) -> Json:
    """Compares one process with two, if there are two cards or the sizes are toy sizes."""
    if not sizes.is_toy and torch.cuda.device_count() < 2:
        return {"not_compared": ["this machine has only one GPU"]}
    return measure_scaling(work, student, sizes)


def show(name: str, figures: Any) -> None:  # Any: open-ended JSON
    """Prints the figures of one part, and the reasons for comparisons that were left out."""
    for entry in figures if isinstance(figures, list) else [figures]:
        for reason in entry.get("not_compared", []):
            print(f"{name}: not compared, because {reason}", flush=True)
        shown = {key: value for key, value in entry.items() if key != "not_compared"}
        if shown:
            print(f"{name}: {json.dumps(shown)}", flush=True)


def driver() -> str:
    """Returns the version of the driver, as nvidia-smi reports it."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
