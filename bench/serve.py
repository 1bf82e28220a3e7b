"""The serving bench: tokens a second, first token, gaps and memory over HTTP, against what users would pick instead.

    .venv/bin/python bench/serve.py [--quick] [--json FILE] [--peer NAME ...]

Every server in turn gets the same model, prompts and callers, on the same threads; turns alternate the order. The load
generator shares the machine's cores with whoever is measured. Answers are greedy, of at most 64 tokens.
"""

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import httpx
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from bench.beside_training import measure_beside_training, table
from bench.cases import Entry
from bench.children import ChildFailed, ask_child, module
from bench.distill import machine
from bench.first_token import first_tokens
from bench.load import Load, Target, drive
from bench.pair_models import THINGS
from bench.servers import NotInstalled, Server, peak_bytes_of_children, serving, settings
from bench.steps import prepare

OURS = Server("ours")
OURS_INT8 = Server("ours", "int8")
QUICK_SERVERS = (
    OURS,
    OURS_INT8,
    Server("transformers_serve", "bfloat16"),
    Server("vllm", "bfloat16"),
    Server("vllm", "bfloat16", is_eager=True),
    Server("llama_cpp", "float16"),
    Server("llama_cpp", "q8_0"),
    Server("llama_cpp", "q4_k_m"),
)
SERVERS = (
    *QUICK_SERVERS,
    Server("transformers_serve", "float32"),
    Server("vllm", "float32"),
    Server("llama_cpp", "float32"),
)
QUANTISED = {OURS_INT8.name, "llama_cpp-q8_0", "llama_cpp-q4_k_m"}  # compared with one another only
INT8_PAIR = (OURS_INT8.name, "llama_cpp-q8_0")
PEERS = ("transformers_serve", "vllm", "llama_cpp")
MODELS = {"smollm2": "teacher_dir", "smollm2-12": "student_dir"}
CALLERS, QUICK_CALLERS = (1, 8, 32, 64), (1, 8, 32)
RATIO_CALLERS = (1, 8, 32)
FLOOR_CALLERS = 32
NUM_PAIRS = 36  # of first tokens over HTTP and in process
LEAST_REQUESTS = 8  # of one load, so that few callers still tell something
MAX_TOKENS = 64
ASKED = (
    "Write a long story about a {}.",
    "Explain in many words how a {} is made.",
    "Describe a {} for somebody who has never seen one.",
    "Write a letter to a friend about the {} that you lost.",
)
PROMPTS = [ask.format(thing) for thing in THINGS for ask in ASKED]


def main() -> int:
    arguments = parse()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    servers = [
        s
        for s in (QUICK_SERVERS if arguments.quick else SERVERS)
        if s.peer in ("ours", *arguments.peer)
        and (not arguments.server or s.name in arguments.server)
    ]
    if not servers:
        raise SystemExit("no server is left; change --server, --peer or --quick")
    report: Entry = {
        "models": {},
        "machine": machine(),
        "num_threads": arguments.threads,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["bench/serve.py", *sys.argv[1:]]),
    }
    if arguments.beside_training:
        return beside_training(work, report, arguments)
    folders = prepare(work, "smollm2-12", num_threads=arguments.threads)
    for name, key in list(MODELS.items())[: 1 if arguments.quick else None]:
        report["models"][name] = measure(Path(folders[key]), servers, arguments)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(report, indent=1))
        show(Console(width=130), name, report["models"][name])
    first = next(iter(report["models"].values()))
    report |= first["figures"]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1))
    return 1 if any(model["failed"] for model in report["models"].values()) else 0


def beside_training(work: Path, report: Entry, arguments: argparse.Namespace) -> int:
    """Our service alone and beside a training job; writes and prints the figures."""
    model_dir = Path(prepare(work, "smollm2-12", num_threads=arguments.threads)["teacher_dir"])
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    with serving(OURS, model_dir, work, arguments.threads) as target:
        report |= measure_beside_training(
            target, PROMPTS, max_tokens=MAX_TOKENS, summary=lambda load: summary(load, tokenizer)
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1))
    headings = (
        "callers",
        "tokens/s alone",
        "beside training",
        "first token p50, ms",
        "beside training",
        "steps/s",
    )
    shown = Table(*headings, title=f"steps/s while nobody asks: {report['steps_per_second_alone']}")
    for row in table(report):
        shown.add_row(*row)
    Console(width=130).print(shown)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/serve.py", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="one model, one turn, fewer callers")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument(
        "--beside-training",
        action="store_true",
        help="ours alone, without and with a job that trains",
    )
    parser.add_argument("--peer", nargs="*", choices=PEERS, default=PEERS, help="none: ours alone")
    parser.add_argument(
        "--server",
        nargs="+",
        choices=[server.name for server in SERVERS],
        help="only these; with --quick, only those of the quick run",
    )
    parser.add_argument(
        "--requests", type=int, default=LEAST_REQUESTS, help="minimum number per load"
    )
    parser.add_argument(
        "--work", type=Path, default=Path(".stillhouse/bench"), help="kept between runs"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int)
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    arguments.turns = arguments.turns or (1 if arguments.quick else 2)
    arguments.callers = QUICK_CALLERS if arguments.quick else CALLERS
    return arguments


def measure(model_dir: Path, servers: Sequence[Server], arguments: argparse.Namespace) -> Entry:
    """All servers on one model, the medians over the turns."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    runs: dict[str, list[Entry]] = {}
    failed: dict[str, str] = {}
    skipped: dict[str, str] = {}
    first: list[Entry] = []
    for turn in range(arguments.turns):
        for server in servers if turn % 2 == 0 else servers[::-1]:
            if server.name in failed | skipped:
                continue
            try:
                with serving(server, model_dir, arguments.work, arguments.threads) as target:
                    runs.setdefault(server.name, []).append(
                        loads(target, arguments.callers, tokenizer, arguments.requests)
                    )
                    if server is OURS:
                        options = {"max_tokens": MAX_TOKENS, "num_threads": arguments.threads}
                        first.append(
                            first_tokens(target, model_dir, PROMPTS[:NUM_PAIRS], **options)
                        )
            except (ChildFailed, RuntimeError, httpx.HTTPError) as e:
                (skipped if isinstance(e, NotInstalled) else failed)[server.name] = str(e)
                print(f"{server.name} left out: {e}", flush=True)
                continue
            print(
                f"{model_dir.name} turn {turn + 1} {server.name}: {told(runs[server.name][-1])}",
                flush=True,
            )
    task = {
        "work": str(arguments.work),
        "num_threads": arguments.threads,
        "model_dir": str(model_dir),
    }
    task |= {
        "num_rows": FLOOR_CALLERS,
        "prompts": PROMPTS[:LEAST_REQUESTS],
        "max_tokens": MAX_TOKENS,
    }
    inside = ask_child(module("engine"), task, keeps_memory=True)
    contenders = {name: over(turns) for name, turns in runs.items()}
    return {
        "figures": figures(contenders, inside) | {"ttft_overhead_ms_p50": overhead_ms(first)},
        "contenders": contenders,
        "in_process": inside,
        "settings": {server.name: settings(server) for server in servers},
        "first_tokens": first,
        "failed": failed,
        "skipped": skipped,
        "turns": runs,
    }


def loads(
    target: Target, callers: Sequence[int], tokenizer: Any, least_requests: int
) -> Entry:  # Any: transformers is untyped here
    drive(target, PROMPTS, num_callers=2, requests_each=1, max_tokens=MAX_TOKENS)  # warms up
    found: Entry = {}
    for num_callers in callers:
        requests_each = max(2, least_requests // num_callers)
        load = drive(
            target,
            PROMPTS,
            num_callers=num_callers,
            requests_each=requests_each,
            max_tokens=MAX_TOKENS,
        )
        found[str(num_callers)] = summary(load, tokenizer)
    return {"loads": found, "peak_bytes": peak_bytes_of_children()}


def summary(load: Load, tokenizer: Any) -> Entry:
    """Tokens are counted in the texts, by the model's own tokenizer, whatever a server calls a token."""
    num_tokens = sum(
        len(tokenizer(a.text, add_special_tokens=False).input_ids) for a in load.answers
    )
    first = [1000 * answer.first_seconds for answer in load.answers]
    gaps = [1000 * gap for answer in load.answers for gap in answer.gaps]
    return {
        "tokens_per_second": num_tokens / load.seconds,
        "first_token_ms_p50": median(first),
        "first_token_ms_p95": _p95(first),
        "gap_ms_p95": _p95(gaps),
        "num_requests": len(load.answers),
        "tokens_an_answer": num_tokens / len(load.answers),
    }


def _p95(values: list[float]) -> float:
    return quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]


def over(turns: list[Entry]) -> Entry:
    """Medians of every figure."""
    callers = turns[0]["loads"]
    return {
        "peak_bytes": int(median(turn["peak_bytes"] for turn in turns)),
        "loads": {
            n: {
                key: round(median(turn["loads"][n][key] for turn in turns), 2) for key in callers[n]
            }
            for n in callers
        },
    }


def figures(contenders: Entry, inside: Entry) -> Entry:
    """Against the best configuration of each peer whose weights are not quantised, and `int8` against Q8_0.

    None where one of the two was not measured. Without `OURS`, only the ratios of int8 are returned.
    """
    found = _int8_figures(contenders)
    if OURS.name not in contenders:
        return found
    ours = contenders[OURS.name]["loads"]
    for peer in PEERS:
        theirs = [
            c["loads"]
            for name, c in contenders.items()
            if name.startswith(peer) and name not in QUANTISED
        ]
        for n in map(str, RATIO_CALLERS):
            best = max((loads[n]["tokens_per_second"] for loads in theirs), default=None)
            ratio = None if best is None else round(ours[n]["tokens_per_second"] / best, 2)
            found[f"ratio_vs_{peer}_{n}"] = ratio
        least = min((loads["32"]["first_token_ms_p50"] for loads in theirs), default=None)
        found[f"first_token_ratio_vs_{peer}_32"] = (
            None if least is None else round(ours["32"]["first_token_ms_p50"] / least, 2)
        )
    seconds_a_step = FLOOR_CALLERS / ours[str(FLOOR_CALLERS)]["tokens_per_second"]
    found["fraction_of_gemm_floor_32"] = round(inside["step_floor_ms"] / 1000 / seconds_a_step, 3)
    return found


def _int8_figures(contenders: Entry) -> Entry:
    found: Entry = {}
    int8, q8_0 = (contenders.get(name, {}).get("loads") for name in INT8_PAIR)
    for n in map(str, RATIO_CALLERS):
        is_there = int8 is not None and q8_0 is not None
        rates = [loads[n]["tokens_per_second"] for loads in (int8, q8_0)] if is_there else None
        found[f"ratio_int8_vs_q8_0_{n}"] = None if rates is None else round(rates[0] / rates[1], 2)
    return found


def overhead_ms(first: list[Entry]) -> float | None:
    """The median over the turns, of which none is where our own service failed."""
    return round(median(turn["overhead_ms_p50"] for turn in first), 1) if first else None


def told(run: Entry) -> str:
    return ", ".join(
        f"{n}: {load['tokens_per_second']:.0f} tokens/s" for n, load in run["loads"].items()
    )


def show(console: Console, name: str, model: Entry) -> None:
    table = Table(title=f"{name}: medians over {len(next(iter(model['turns'].values())))} turns")
    for heading in (
        "server",
        "callers",
        "tokens/s",
        "first token p50 · p95, ms",
        "gap p95, ms",
        "peak GB",
    ):
        table.add_column(heading, justify="left" if heading == "server" else "right")
    for server, contender in model["contenders"].items():
        for n, load in contender["loads"].items():
            first = f"{load['first_token_ms_p50']:.0f} · {load['first_token_ms_p95']:.0f}"
            rate, gap = f"{load['tokens_per_second']:.0f}", f"{load['gap_ms_p95']:.0f}"
            table.add_row(server, n, rate, first, gap, f"{contender['peak_bytes'] / 1e9:.1f}")
    console.print(table)
    for name, how in model["settings"].items():
        console.print(f"{name}: {how}", highlight=False)
    for key, value in model["figures"].items():
        console.print(f"{key}: {value}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
