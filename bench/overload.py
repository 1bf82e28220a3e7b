"""The overload bench: ten times the callers that are admitted, and clients that hang up, against a real service.

    .venv/bin/python bench/overload.py [--seconds 60] [--drops 200] [--model DIR] [--json FILE]

Callers ask again as soon as Retry-After lets them. Half of them share one key and run into its limit, the others into the
server's. A dropped client's generation has stopped if the worker, once told, wrote no more than the step that was under way.
"""

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
from rich.console import Console

from app.commands.demo import running_service
from app.local.embedded_servers import read_service
from app.settings import Settings
from bench.callers import Drop, Tally, drop_streams, press
from bench.cases import Entry
from bench.children import ROOT, run
from bench.distill import machine
from bench.load import Target
from bench.servers import descendants, wait_until_answering
from bench.steps import prepare

FACTOR = 10  # callers for each request that is admitted
NUM_KEYS = 5
RAMP_SECONDS = 3.0  # in which the callers come
SETTLE_SECONDS = (
    10.0  # after which memory is first read: pools and threads have grown to their size
)
WATCH_SECONDS = 2.0
MiB = 2**20


def main() -> int:
    arguments = parse()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65_536), most))
    folder = arguments.model or Path(
        prepare(work, "smollm2-12", num_threads=arguments.threads)["teacher_dir"]
    )
    with service(folder, work / "overload", arguments.threads) as (targets, redis_url):
        report: Entry = {"machine": machine(), "model": folder.name}
        if arguments.drops:
            drops = asyncio.run(
                drop_streams(
                    targets[0], redis_url, num_drops=arguments.drops, num_callers=arguments.droppers
                )
            )
            report["drops"] = told_of_drops(drops)
            print(json.dumps(report["drops"]), flush=True)
        if arguments.seconds:
            report["overload"] = asyncio.run(overload(targets, arguments))
            print(json.dumps(report["overload"]), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/overload.py", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="0: no overload")
    parser.add_argument("--drops", type=int, default=200, help="0: none")
    parser.add_argument("--droppers", type=int, default=8, help="clients that hang up, at once")
    parser.add_argument("--model", type=Path, help="a folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument(
        "--work", type=Path, default=Path(".stillhouse/bench"), help="kept between runs"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=16)
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    return arguments


@contextmanager
def service(
    model_dir: Path, data_dir: Path, num_threads: int
) -> Iterator[tuple[list[Target], str]]:
    """Our service with the model loaded, a target for each of several keys, and the message queue's URL."""
    name = model_dir.name.lower()
    os.environ["STILLHOUSE_NUM_THREADS"] = str(num_threads)
    with running_service(data_dir, Console(quiet=True)) as client:
        cli = [sys.executable, "-m", "app.commands.cli"]
        if all(model["id"] != name for model in client.get("/v1/models").json()["data"]):
            run(
                [
                    *cli,
                    "models",
                    "import",
                    str(model_dir),
                    "--name",
                    name,
                    "--data-dir",
                    str(data_dir),
                ]
            )
        wait_until_answering(client, name)
        command = [*cli, "keys", "create", "--project", "default", "--data-dir", str(data_dir)]
        keys = [
            subprocess.check_output(command, cwd=ROOT, text=True).split()[-1]
            for _ in range(NUM_KEYS)
        ]
        url = str(client.base_url).rstrip("/")
        yield (
            [Target(url, name, key) for key in keys],
            read_service(data_dir)["STILLHOUSE_REDIS_URL"],
        )


async def overload(targets: list[Target], arguments: argparse.Namespace) -> Entry:
    """All callers at once for so long; then nobody begins anew, and all answers must come to their end."""
    num_callers = FACTOR * Settings().max_waiting_requests
    tally = Tally()
    began = time.monotonic()
    until = began + arguments.seconds
    memory = Memory()
    watch = asyncio.create_task(memory.watch(began + SETTLE_SECONDS))

    async def call(number: int) -> None:
        await asyncio.sleep(RAMP_SECONDS * number / num_callers)
        target = targets[0] if number % 2 else targets[1 + number // 2 % (len(targets) - 1)]
        await press(target, tally, until=until, max_tokens=arguments.max_tokens, wait_seconds=60.0)

    await asyncio.gather(*(call(number) for number in range(num_callers)))
    seconds = time.monotonic() - began
    watch.cancel()
    return {
        "num_callers": num_callers,
        "seconds": round(seconds, 1),
        "num_answers": tally.num_answers,
        "answers_per_second": round(tally.num_answers / seconds, 1),
        "answer_seconds": spread(tally.answer_seconds),
        "refusals": dict(tally.refusals),
        "refusals_without_retry_after": tally.num_without_retry_after,
        "refusal_seconds": spread(tally.refusal_seconds),
        "num_hung": tally.num_hung,
        "num_broken_connections": tally.num_broken,
        "memory": memory.told(),
    }


class Memory:
    """Resident memory of every process of the service over time, in bytes."""

    def __init__(self) -> None:
        self._seen: dict[str, list[int]] = {}

    async def watch(self, since: float) -> None:
        await asyncio.sleep(max(0.0, since - time.monotonic()))
        while True:
            self._look()
            await asyncio.sleep(WATCH_SECONDS)

    def _look(self) -> None:
        for process in descendants(psutil.Process().pid):
            try:
                name = f"{role_of(process)} {process.pid}"
                self._seen.setdefault(name, []).append(process.memory_info().rss)
            except psutil.NoSuchProcess:
                continue

    def told(self) -> Entry:
        """MiB after settling, at the end and at most, of each process that was there all the time."""
        whole = max(map(len, self._seen.values()), default=0)
        return {
            name: {
                "first_mib": round(values[0] / MiB, 1),
                "last_mib": round(values[-1] / MiB, 1),
                "most_mib": round(max(values) / MiB, 1),
                "growth_mib": round((values[-1] - values[0]) / MiB, 1),
            }
            for name, values in self._seen.items()
            if len(values) == whole and values[0] > 8 * MiB
        }


def role_of(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    roles = (
        "app.commands.cli up",
        "app.commands.cli api",
        "worker.main train",
        "worker.main serve",
        "postgres",
        "valkey",
    )
    return next((role for role in roles if role in line), process.name())


def told_of_drops(drops: list[Drop]) -> Entry:
    delays = [1000 * (drop.told_at - drop.left_at) for drop in drops if drop.told_at is not None]
    return {
        "num_drops": len(drops),
        "num_stopped_within_a_step": sum(drop.has_stopped for drop in drops),
        "most_deltas_after_the_worker_was_told": max(drop.num_after_telling for drop in drops),
        "most_deltas_after_the_client_had_left": max(drop.num_after_leaving for drop in drops),
        "ms_from_leaving_to_telling": spread(delays),
    }


def spread(values: list[float]) -> Entry | None:
    if len(values) < 2:
        return None
    return {
        "p50": round(median(values), 3),
        "p95": round(quantiles(values, n=20)[-1], 3),
        "most": round(max(values), 3),
    }


if __name__ == "__main__":
    sys.exit(main())
