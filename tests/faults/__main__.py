"""`python -m tests.faults`: every promise under its faults, as a table and as JSON. Status 1 if one is broken."""

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.faults import disk, killing, outages
from tests.faults.checker import unreadable_checkpoints
from tests.faults.system import System
from tests.faults.trial import Figures, Trial

SETTLE_SECONDS: Final = 240.0


@dataclass(frozen=True)
class Promise:
    """A row of the table. `share` is its part of the minutes, `short` the faults of the short form."""

    name: str
    says: str
    target: int
    share: float
    short: int
    run: Callable[[Trial], None]


PROMISES: Final = (
    Promise("kills", "one terminal state under kill -9 of any process", 500, 5, 6, killing.kills),
    Promise("crash_points", "every crash point", 20 * len(killing.ALL_POINTS), 5, 5, killing.crash_points),
    Promise("valkey", "Valkey killed without its log, flushed, down", 140, 3, 3, outages.valkey),
    Promise("postgres", "Postgres restarts, ended backends, no false reap", 260, 4, 4, outages.postgres),
    Promise("idempotency", "one key fifty times at once", 200, 2, 2, killing.idempotency),
    Promise("cancels", "a cancel at any moment ends the job in 30 s", 300, 3, 4, killing.cancels),
    Promise("duplicates", "every message five times", 1000, 2, 10, killing.duplicates),
    Promise("zombies", "a zombie's writes are refused", 100, 4, 1, killing.zombies),
    Promise("links", "a link swallows, resets, cuts, delays", 200 * len(outages.LINKS), 4, 4, outages.links),
)


def run_promises(
    system: System, promises: Sequence[Promise], *, seed: int, seconds: float, is_short: bool
) -> list[Figures]:
    """One after the other on the same system; each with its own dice, so that one alone repeats."""
    total = sum(promise.share for promise in promises)
    found = []
    for promise in promises:
        print(f"{time.strftime('%H:%M:%S')} {promise.name}", file=sys.stderr, flush=True)
        trial = Trial(
            promise.name,
            system,
            random.Random(f"{seed}-{promise.name}"),
            promise.short if is_short else promise.target,
            seconds * promise.share / total,
        )
        try:
            promise.run(trial)
        except AssertionError as error:
            trial.wrongs.append(str(error))
        figures = trial.judge(60.0 if is_short else SETTLE_SECONDS)
        figures.target = promise.target
        figures.wrongs += unreadable_checkpoints(system)
        found.append(figures)
        print(json.dumps(figures.as_json()), file=sys.stderr, flush=True)
    return found


def table(found: Sequence[Figures]) -> str:
    """Markdown: what was injected beside what a full run wants."""
    says = {promise.name: promise.says for promise in PROMISES} | disk.SAYS
    lines = [
        "| promise | faults | target | accepted | lost | duplicated | recovered p50 / p95, s | kept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for figures in found:
        row = figures.as_json()
        recovered = f"{row['recovered_p50_s'] or '–'} / {row['recovered_p95_s'] or '–'}"
        lines.append(
            f"| {says[figures.promise]} | {figures.faults} | {figures.target} | {figures.accepted} "
            f"| {figures.lost} | {figures.duplicated} | {recovered} | {'yes' if figures.is_kept else '**no**'} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a handful of each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", metavar="PROMISE", help="these alone")
    parser.add_argument("--minutes", type=float, default=60.0, help="for all of them together")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--folder", type=Path, help="keep logs and data here")
    asked = parser.parse_args()
    names = asked.only or [*(promise.name for promise in PROMISES), *disk.SAYS]
    unknown = set(names) - {promise.name for promise in PROMISES} - set(disk.SAYS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="still-faults-", dir="/tmp"))
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    found = []
    wanted = [promise for promise in PROMISES if promise.name in names]
    if wanted:
        with System(folder) as system:
            found += run_promises(
                system, wanted, seed=asked.seed, seconds=60 * asked.minutes, is_short=asked.short
            )
    for name in disk.SAYS:
        if name in names:
            found.append(disk.run(name, folder, seed=asked.seed, is_short=asked.short))
    report: dict[str, Any] = {  # Any: JSON
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "seed": asked.seed,
        "minutes": asked.minutes,
        "machine": f"{platform.machine()}, {_num_cores()} cores, Python {platform.python_version()}",
        "promises": [figures.as_json() for figures in found],
    }
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(report, indent=1))
    print(table(found))
    for figures in found:
        for wrong in figures.wrongs[:10]:
            print(f"{figures.promise}: {wrong}")
    print(f"seed {asked.seed}; logs in {folder}")
    return 0 if all(figures.is_kept for figures in found) else 1


def _num_cores() -> int:
    import os

    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    sys.exit(main())
