"""Injects the faults of every promise and prints a table and JSON: `python -m tests.faults`.

The exit status is 1 if a promise is broken.
"""

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
from typing import Final

from tests.faults import disk, killing, outages
from tests.faults.checker import unreadable_checkpoints
from tests.faults.lanes import Json, pack, run_lanes
from tests.faults.system import System
from tests.faults.trial import Figures, Trial

SETTLE_SECONDS: Final = 240.0
NUM_LANES: Final = 5


@dataclass(frozen=True)
class Promise:
    """One row of the table.

    `minutes` is the approximate time for `target` faults with four other promises on two cores.
    `short` is the number of faults of the short form.
    """

    name: str
    says: str
    target: int
    minutes: float
    short: int
    run: Callable[[Trial], None]


PROMISES: Final = (
    Promise("kills", "one terminal state when any process is killed", 500, 29, 6, killing.kills),
    Promise(
        "crash_points",
        "one terminal state after a crash at every crash point",
        20 * len(killing.ALL_POINTS),
        52,
        5,
        killing.crash_points,
    ),
    Promise(
        "valkey", "Valkey is killed without its log, flushed, or down", 140, 31, 3, outages.valkey
    ),
    Promise(
        "postgres", "Postgres restarts, and no lease expires wrongly", 260, 8, 4, outages.postgres
    ),
    Promise(
        "idempotency",
        "one idempotency key is sent fifty times at once",
        200,
        5,
        2,
        killing.idempotency,
    ),
    Promise(
        "cancels", "a cancel at any moment ends the job within 30 s", 300, 8, 4, killing.cancels
    ),
    Promise("duplicates", "every message is delivered five times", 1000, 8, 10, killing.duplicates),
    Promise("zombies", "writes of a stale worker are refused", 100, 65, 1, killing.zombies),
    Promise(
        "data_links",
        "a connection to Postgres or of a client stalls, resets, closes or is slow",
        600,
        36,
        2,
        outages.data_links,
    ),
    Promise(
        "message_links",
        "a connection to Valkey stalls, resets, closes or is slow",
        600,
        34,
        2,
        outages.message_links,
    ),
)
ORDER: Final = [*(promise.name for promise in PROMISES), *disk.SAYS]


def run_promises(
    system: System, promises: Sequence[Promise], *, seed: int, seconds: float, is_short: bool
) -> list[Figures]:
    """Runs promises in sequence on one system.

    Each has its own random numbers, so that it can be repeated alone.
    """
    total = sum(promise.minutes for promise in promises)
    found = []
    for promise in promises:
        print(f"{time.strftime('%H:%M:%S')} {promise.name}", file=sys.stderr, flush=True)
        trial = Trial(
            promise.name,
            system,
            random.Random(f"{seed}-{promise.name}"),
            promise.short if is_short else promise.target,
            seconds * promise.minutes / total,
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


def table(rows: Sequence[Json]) -> str:
    """Returns a Markdown table of the injected faults and their targets."""
    says = {promise.name: promise.says for promise in PROMISES} | disk.SAYS
    lines = [
        "| promise | faults | target | accepted | trained | lost | duplicated | recovered p50 / p95, s | kept |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        recovered = f"{row['recovered_p50_s'] or '–'} / {row['recovered_p95_s'] or '–'}"
        lines.append(
            f"| {says[row['promise']]} | {row['faults']} | {row['target']} | {row['accepted']} | {row['trained']} "
            f"| {row['lost']} | {row['duplicated']} | {recovered} | {'yes' if row['is_kept'] else '**no**'} |"
        )
    return "\n".join(lines)


def main() -> int:
    asked = parse()
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="still-faults-", dir="/tmp"))
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    shares = {promise.name: promise.minutes for promise in PROMISES} | disk.MINUTES
    lanes = pack({name: shares[name] for name in asked.only}, asked.lanes)
    if len(lanes) > 1:
        rows = run_lanes(lanes, folder, seed=asked.seed, minutes=asked.minutes)
    else:
        rows = run_lane(asked, folder)
    rows.sort(key=lambda row: ORDER.index(row["promise"]))
    report: Json = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "seed": asked.seed,
        "minutes": asked.minutes,
        "lanes": len(lanes),
        "machine": f"{platform.machine()}, {_num_cores()} cores, Python {platform.python_version()}",
        "promises": rows,
    }
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(report, indent=1))
    print(table(rows))
    for row in rows:
        for wrong in row["wrongs"][:10]:
            print(f"{row['promise']}: {wrong}")
    print(f"seed {asked.seed}; logs in {folder}")
    return 0 if all(row["is_kept"] for row in rows) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument(
        "--short", action="store_true", help="a handful of each, one after the other"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", metavar="PROMISE", choices=ORDER, default=ORDER)
    parser.add_argument("--minutes", type=float, default=65.0, help="for all of them together")
    parser.add_argument("--lanes", type=int, default=NUM_LANES, help="systems side by side")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--folder", type=Path, help="keep logs and data here")
    asked = parser.parse_args()
    if asked.short:
        asked.lanes = 1
    return asked


def run_lane(asked: argparse.Namespace, folder: Path) -> list[Json]:
    """All that is asked for, on one system and one after the other."""
    found = []
    wanted = [promise for promise in PROMISES if promise.name in asked.only]
    if wanted:
        minutes = sum(promise.minutes for promise in wanted)
        # which end by their counts
        disks = sum(disk.MINUTES[name] for name in disk.SAYS if name in asked.only)
        seconds = 60 * asked.minutes * minutes / (minutes + disks)
        with System(folder) as system:
            found += run_promises(
                system, wanted, seed=asked.seed, seconds=seconds, is_short=asked.short
            )
    for name in disk.SAYS:
        if name in asked.only:
            found.append(disk.run(name, folder, seed=asked.seed, is_short=asked.short))
    return [figures.as_json() for figures in found]


def _num_cores() -> int:
    import os

    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    sys.exit(main())
