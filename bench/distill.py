"""The distillation bench: step time, peak memory, fraction of the GEMM floor and time to quality, against TRL's GKD.

    .venv/bin/python bench/distill.py [--quick] [--json FILE] [--case NAME ...]

Prepares what it needs in the work folder (the teacher, its answers, an environment for TRL) and runs every contender
in a process of its own, in turns: same models, batches, threads, floats and optimizer.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from bench.cases import CASES, RATIOS, Entry, quick
from bench.children import ChildFailed
from bench.quality import QUICK_SHARES, SHARES, measure_quality
from bench.steps import measure_steps
from bench.table import show

DEFAULT_CASE = "smollm2"
QUALITY = "quality"
FULL_TURNS, QUICK_TURNS = 3, 1
FULL_SECONDS, QUICK_SECONDS = 360.0, 60.0  # TRL's budget
STEP_FIGURES = (*RATIOS, "peak_memory_ratio_vs_trl", "fraction_of_gemm_floor")


def main() -> int:
    arguments = parse()
    arguments.work.mkdir(parents=True, exist_ok=True)
    report: Entry = dict.fromkeys((*STEP_FIGURES, "time_to_quality_ratio"))
    report |= {
        "cases": {},
        "failed": {},
        "machine": machine(),
        "num_threads": arguments.threads,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["bench/distill.py", *sys.argv[1:]]),
    }
    for name in arguments.case:
        try:
            report["cases"][name] = measure(name, arguments)
        except ChildFailed as e:
            report["failed"][name] = str(e)
            print(f"{name} failed: {e}", flush=True)
        lift(report, name)
        if arguments.json is not None:
            # after each case: a killed run leaves its part
            arguments.json.write_text(json.dumps(report, indent=1))
    show(Console(width=140), report)
    failed = report["failed"] or any(case.get("failed") for case in report["cases"].values())
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/distill.py", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument(
        "--quick", action="store_true", help="few steps, one turn, a budget of a minute"
    )
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--case", nargs="+", choices=[*(n for n in CASES if n != "tiny"), QUALITY])
    parser.add_argument(
        "--work", type=Path, default=Path(".stillhouse/bench"), help="kept between runs"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, help=f"{FULL_TURNS}, or {QUICK_TURNS} with --quick")
    # tiny random models, without TRL
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    if arguments.turns is None:
        arguments.turns = QUICK_TURNS if arguments.quick or arguments.smoke else FULL_TURNS
    if arguments.smoke:
        arguments.case = ["tiny"]
    arguments.case = arguments.case or [DEFAULT_CASE, QUALITY, "t5", "vocab150k"]
    return arguments


def measure(name: str, arguments: argparse.Namespace) -> Entry:
    if name == QUALITY:
        return measure_quality(
            work=arguments.work,
            num_threads=arguments.threads,
            num_turns=arguments.turns,
            budget_seconds=QUICK_SECONDS if arguments.quick else FULL_SECONDS,
            shares=QUICK_SHARES if arguments.quick else SHARES,
        )
    case = quick(CASES[name]) if arguments.quick else CASES[name]
    return measure_steps(
        case, work=arguments.work, num_threads=arguments.threads, num_turns=arguments.turns
    )


def lift(report: Entry, name: str) -> None:
    """The figures at the top are those of the default case (in a smoke run, of the tiny one) and of the quality run."""
    case = report["cases"].get(name, {})
    keys = {QUALITY: ("time_to_quality_ratio",), DEFAULT_CASE: STEP_FIGURES, "tiny": STEP_FIGURES}
    report.update({key: case.get(key) for key in keys.get(name, ())})
    for contender in case.get("contenders", {}).values():
        report.setdefault("versions", {})[contender["engine"]] = contender["versions"]


def machine() -> Entry:
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {"cpu": cpu, "num_cpus": len(os.sched_getaffinity(0)), "memory_bytes": _memory_bytes()}


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


if __name__ == "__main__":
    sys.exit(main())
