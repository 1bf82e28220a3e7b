"""Promises side by side: a lane is a system of its own in a process of its own, so that one's waiting costs nobody time."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from app.parent_death import tethered
from tests.faults.system import ROOT
from tests.faults.trial import Figures

Json = dict[str, Any]  # Any: a row of the report


def pack(shares: Mapping[str, float], num_lanes: int) -> list[list[str]]:
    """Names by their part of the time, the longest first and each into the lane that has least; no lane is empty."""
    lanes: list[list[str]] = [[] for _ in range(min(num_lanes, len(shares)))]
    for name in sorted(shares, key=lambda name: -shares[name]):
        min(lanes, key=lambda lane: sum(shares[each] for each in lane)).append(name)
    return lanes


def run_lanes(
    lanes: Sequence[Sequence[str]], folder: Path, *, seed: int, minutes: float
) -> list[Json]:
    """The rows of all lanes; a lane that did not get to its end has rows that say so."""
    runs = [_start(lane, folder / f"lane-{i}", seed, minutes) for i, lane in enumerate(lanes)]
    rows: list[Json] = []
    for (process, report), lane in zip(runs, lanes, strict=True):
        status = process.wait()
        told: list[Json] = json.loads(report.read_text())["promises"] if report.exists() else []
        names = {row["promise"] for row in told}
        broken = [f"its lane ended with status {status} before it"]
        rows += [
            *told,
            *(Figures(name, wrongs=broken).as_json() for name in lane if name not in names),
        ]
    return rows


def _start(
    lane: Sequence[str], folder: Path, seed: int, minutes: float
) -> tuple[subprocess.Popen[bytes], Path]:
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.faults", "--lanes", "1", "--only", *lane]
    command += ["--seed", str(seed), "--minutes", str(minutes)]
    command += ["--json", str(report), "--folder", str(folder)]
    return subprocess.Popen(tethered(command), cwd=ROOT, stdout=subprocess.DEVNULL), report
