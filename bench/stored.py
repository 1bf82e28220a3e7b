"""The cost of stored completions: the same callers with `store: false` and with `store: true`, in turns.

    .venv/bin/python bench/stored.py [--model DIR] [--callers 32] [--turns 5] [--each 4] [--json FILE]

One service with its own Postgres and Valkey answers all. Each turn has both settings, in alternating order. The ratio is
that of the medians of tokens per second. CPU time is that of all processes of the service except its workers, so it has
the API and Postgres; other processes of the machine disturb it less. At the end every stored answer must be in the list,
once.
"""

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import httpx
import psutil

from bench.cases import Entry
from bench.distill import machine
from bench.load import REQUEST_SECONDS, Target, chunks_of
from bench.overload import service
from bench.steps import prepare

PROMPT = "Explain in a few sentences why {} matters, number {}."
SUBJECTS = ("money", "rain", "bread", "glass", "iron", "wool", "salt", "paper")
STORED_SECONDS = 30.0
SETTLE_SECONDS = 1.0


def main() -> int:
    arguments = parse()
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    folder = arguments.model or Path(
        prepare(work, "smollm2-12", num_threads=arguments.threads)["teacher_dir"]
    )
    with service(folder, work / "stored", arguments.threads) as (targets, _):
        report = asyncio.run(measure(targets[0], arguments))
    report |= {"machine": machine(), "model": folder.name}
    print(json.dumps(report, indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1))
    return 0 if report["num_missing"] == 0 and report["num_twice"] == 0 else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/stored.py", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--model", type=Path, help="a folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--each", type=int, default=4, help="requests of each caller per turn")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--logprobs", action="store_true", help="with 5 alternatives per token")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument(
        "--work", type=Path, default=Path(".stillhouse/bench"), help="kept between runs"
    )
    return parser.parse_args()


async def measure(target: Target, arguments: argparse.Namespace) -> Entry:
    rates: dict[bool, list[float]] = {False: [], True: []}
    first: dict[bool, list[float]] = {False: [], True: []}
    cpu: dict[bool, list[float]] = {False: [], True: []}
    ids: list[str] = []
    headers = {"Authorization": f"Bearer {target.key}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        limits=limits, headers=headers, timeout=REQUEST_SECONDS, trust_env=False
    ) as client:
        await turn(client, target, arguments, is_stored=False)  # not counted
        for number in range(arguments.turns):
            for is_stored in (False, True) if number % 2 else (True, False):
                began = cpu_seconds()
                rate, waits, answered = await turn(client, target, arguments, is_stored=is_stored)
                await asyncio.sleep(SETTLE_SECONDS)  # the last answers are inserted
                cpu[is_stored].append((cpu_seconds() - began) / len(answered) * 1000)
                rates[is_stored].append(rate)
                first[is_stored] += waits
                ids += answered if is_stored else []
        listing_began = time.monotonic()
        kept = await stored_ids(client, target, set(ids))
    return {
        "callers": arguments.callers,
        "logprobs": arguments.logprobs,
        "tokens_per_second": {"plain": rates[False], "stored": rates[True]},
        "ratio": median(rates[True]) / median(rates[False]),
        "cpu_ms_per_answer": {"plain": median(cpu[False]), "stored": median(cpu[True])},
        "first_token_seconds_p50": {"plain": median(first[False]), "stored": median(first[True])},
        "first_token_seconds_p95": {
            "plain": quantiles(first[False], n=20)[-1],
            "stored": quantiles(first[True], n=20)[-1],
        },
        "num_stored": len(ids),
        "num_missing": len(set(ids) - set(kept)),
        "num_twice": len(kept) - len(set(kept)),
        "seconds_until_all_are_listed": time.monotonic() - listing_began,
    }


async def turn(
    client: httpx.AsyncClient, target: Target, arguments: argparse.Namespace, *, is_stored: bool
) -> tuple[float, list[float], list[str]]:
    """Returns tokens per second, seconds to each first token, and the ids of the answers."""
    waits: list[float] = []
    ids: list[str] = []
    num_tokens = 0

    async def call(caller: int) -> None:
        nonlocal num_tokens
        for number in range(arguments.each):
            content = PROMPT.format(SUBJECTS[(caller + number) % len(SUBJECTS)], caller)
            body: Entry = {
                "model": target.model,
                "messages": [{"role": "user", "content": content}],
                "max_tokens": arguments.max_tokens,
                "temperature": 0.0,
                "stream": True,
                "stream_options": {"include_usage": True},
                "ignore_eos": True,
                "store": is_stored,
                "metadata": {"turn": "bench", "caller": str(caller)},
            }
            if arguments.logprobs:
                body |= {"logprobs": True, "top_logprobs": 5}
            began = time.perf_counter()
            waited = None
            url = f"{target.url}/v1/chat/completions"
            async with client.stream("POST", url, json=body) as response:
                response.raise_for_status()
                async for chunk in chunks_of(response):
                    if waited is None and any(c["delta"].get("content") for c in chunk["choices"]):
                        waited = time.perf_counter() - began
                    if chunk.get("usage"):
                        num_tokens += chunk["usage"]["completion_tokens"]
                        ids.append(chunk["id"])
            waits.append(waited or time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(call(caller) for caller in range(arguments.callers)))
    return num_tokens / (time.perf_counter() - began), waits, ids


def cpu_seconds() -> float:
    """Returns the CPU time so far of the processes of the service except its workers."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            if "worker" not in " ".join(process.cmdline()):
                times = process.cpu_times()
                total += times.user + times.system
        except psutil.NoSuchProcess:
            continue  # it has ended
    return total


async def stored_ids(client: httpx.AsyncClient, target: Target, wanted: set[str]) -> list[str]:
    """Returns the listed ids of this run, once all are there or after STORED_SECONDS."""
    deadline = time.monotonic() + STORED_SECONDS
    while True:
        listed: list[str] = []
        after: str | None = None
        while True:
            query = {"limit": "100"} | ({"after": after} if after else {})
            page = (
                await client.get(f"{target.url}/v1/chat/completions", params=query)
            ).raise_for_status()
            listed += [row["id"] for row in page.json()["data"] if row["id"] in wanted]
            after = page.json()["last_id"]
            if not page.json()["has_more"]:
                break
        if wanted <= set(listed) or time.monotonic() > deadline:
            return listed
        await asyncio.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
