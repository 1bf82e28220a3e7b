"""`python -m tests.soak`: mixed load on a whole service for an hour; does anything grow? Status 1 if so."""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from tests.e2e.service import TEACHER, Service, start_service
from tests.faults.system import ROOT
from tests.soak.load import MAX_FAULTS, Load
from tests.soak.sampling import Figure, Sampler
from tests.soak.trend import Point, Trend, fit

Json = dict[str, Any]  # Any: the report
# Small limits, so that models are evicted and teacher caches deleted all along.
SETTINGS: Final = {
    "STILLHOUSE_RESIDENT_MODEL_BYTES": "6000000",
    "STILLHOUSE_TEACHER_CACHE_BYTES": "500000",
}
MAKE_TEACHER: Final = "import sys; from pathlib import Path; from tests.tiny import save_tiny; save_tiny(Path(sys.argv[1]), 'llama')"


def soak(
    service: Service, teacher_dir: Path, *, seconds: float, seed: int, sample_seconds: float
) -> Json:
    """Runs the load for so long and returns the report; the service has the teacher already."""
    load, sampler = Load(service, teacher_dir, seed), Sampler(service, sample_seconds)
    load.start()
    sampler.start()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(min(60.0, max(0.0, deadline - time.monotonic())))
        print(f"{time.strftime('%H:%M:%S')} {dict(load.counts)}", file=sys.stderr, flush=True)
    sampler.stop()
    load.stop()
    faults = list(load.faults)
    faults += [
        f"{name} was started again"
        for name, pids in sampler.pids().items()
        if pids != sampler.first_pids[name]
    ]
    if num_runs := sampler.num_runs():
        faults.append(f"{num_runs} processes of jobs are left after all jobs have ended")
    rows = [row_of(figure, fit(points)) for figure, points in sampler.series.items()]
    return {
        "counts": dict(sorted(load.counts.items())),
        "faults": faults[:MAX_FAULTS],
        "num_faults": len(faults),
        "figures": rows,
        "samples": samples_of(sampler.series),
    }


def row_of(figure: Figure, trend: Trend | None) -> Json:
    """A row of the table; without a trend the time was too short."""
    if trend is None:
        verdict = "too few samples"
    elif figure.tolerance is None:
        verdict = f"not judged: {figure.why_not_judged}"
    else:
        verdict = "grows" if trend.grows(figure.tolerance) else "does not grow"
    return asdict(figure) | {"trend": asdict(trend) if trend else None, "verdict": verdict}


def samples_of(series: Mapping[Figure, Sequence[Point]]) -> Json:
    return {
        f"{figure.owner}: {figure.name}": [
            [round(time, 1), round(value, 3)] for time, value in points
        ]
        for figure, points in series.items()
    }


def table(rows: Sequence[Json]) -> str:
    """Markdown; slopes are per hour."""
    lines = [
        "| process | figure | first | last | slope per hour | 95% interval | tolerance | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        trend = row["trend"]
        tolerance = "–" if row["tolerance"] is None else f"{row['tolerance']:g}"
        told = ["–"] * 4
        if trend is not None:
            told = [f"{trend['first']:.1f}", f"{trend['last']:.1f}", f"{trend['slope']:+.1f}"]
            told.append(f"{trend['low']:+.1f} to {trend['high']:+.1f}")
        verdict = f"**{row['verdict']}**" if row["verdict"] == "grows" else row["verdict"]
        lines.append(f"| {' | '.join([row['owner'], row['name'], *told, tolerance, verdict])} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sample-seconds", type=float, default=5.0)
    parser.add_argument("--json", type=Path, help="where the report goes, samples included")
    parser.add_argument("--folder", type=Path, help="keep logs and data here")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="still-soak-", dir="/tmp"))
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)  # Postgres may run as another user
    teacher_dir = folder / "teacher"
    if not teacher_dir.exists():
        subprocess.run([sys.executable, "-c", MAKE_TEACHER, str(teacher_dir)], cwd=ROOT, check=True)
    service = start_service(folder / "data", **SETTINGS)
    try:
        service.cli("models", "import", str(teacher_dir), "--name", TEACHER)
        report = soak(
            service,
            teacher_dir,
            seconds=60 * arguments.minutes,
            seed=arguments.seed,
            sample_seconds=arguments.sample_seconds,
        )
    finally:
        status = service.stop()
    report |= {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "minutes": arguments.minutes,
        "seed": arguments.seed,
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "exit_status_of_the_service": status,
    }
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1))
    print(table(report["figures"]))
    print(f"\n{report['counts']}")
    for fault in report["faults"]:
        print(f"fault: {fault}")
    print(f"seed {arguments.seed}; logs in {folder}")
    is_growing = any(row["verdict"] == "grows" for row in report["figures"])
    return 1 if is_growing or report["num_faults"] or status else 0


if __name__ == "__main__":
    sys.exit(main())
