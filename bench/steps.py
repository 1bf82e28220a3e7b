"""Step time, peak memory and the fraction of the GEMM floor, every contender in a process of its own, in turns."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from bench.cases import (
    FLOOR_OF,
    KEEPS_MEMORY,
    MEMORY_OF,
    RATIOS,
    Case,
    Contender,
    Entry,
    batches_of,
)
from bench.children import ChildFailed, ask_child, model_packages, module, trl_program

LEARNING_RATE = 1e-4  # no matter for the time
LOSS_TOLERANCE = 2e-3  # by which the first losses of contenders with one divergence may differ


def prepare(work: Path, models: str, *, num_threads: int, wants_rows: bool = False) -> Entry:
    """Where a pair of models lies; made the first time."""
    task: Entry = {
        "work": str(work),
        "models": models,
        "num_threads": num_threads,
        "wants_rows": wants_rows,
    }
    if models.startswith("smollm2"):
        task["packages"] = str(model_packages(work))
    return ask_child(module("prepare"), task)


def measure_steps(case: Case, *, work: Path, num_threads: int, num_turns: int) -> Entry:
    """The case's figures: every one the median over the turns."""
    task = _task(case, work, num_threads)
    programs = {"ours": module("ours"), "plain": module("plain")}
    if any(contender.engine == "trl" for contender in case.contenders):
        programs["trl"] = trl_program(work)
    failed: dict[str, str] = {}
    _fill_caches(case, task, programs["ours"], failed)
    turns: list[Entry] = []
    floors: list[Entry] = []
    for turn in range(num_turns):
        answers: Entry = {}
        for contender in case.contenders:
            if contender.name in failed:
                continue
            try:
                answers[contender.name] = _run_one(contender, task, programs, case.num_warmup)
                shown = answers[contender.name]
                print(
                    f"{case.name} turn {turn + 1}/{num_turns} {contender.name}: {shown['ms']:.0f} ms",
                    flush=True,
                )
            except ChildFailed as e:
                failed[contender.name] = str(e)
                print(f"{case.name} {contender.name} failed: {e}", flush=True)
        ours = [asdict(c) for c in case.contenders if c.engine == "ours"]
        # with our own allocator settings: else fresh memory would slow the products and flatter the fraction
        floors.append(ask_child(module("floor"), {**task, "contenders": ours}, keeps_memory=True))
        turns.append(answers)
    return _summary(case, turns, floors, failed)


def _task(case: Case, work: Path, num_threads: int) -> Entry:
    models = prepare(work, case.models, num_threads=num_threads)
    data = batches_of(case, num_tokens=models["num_tokens"], start_id=models["start_id"])
    rows_path = work / f"{case.name}-rows.json"
    rows_path.write_text(json.dumps(data))
    row = data["rows"][0]
    return {
        **models,
        "do": "time_steps",
        "work": str(work),
        "num_threads": num_threads,
        "rows_path": str(rows_path),
        "batches": data["batches"],
        "batch_rows": case.sizes.num_rows,
        "batch_tokens": case.sizes.num_rows * (len(row["token_ids"]) + len(row["source_ids"])),
        "learning_rate": LEARNING_RATE,
        "cache_dir": str(work / "caches" / case.name),
        "seed": 0,
    }


def _fill_caches(case: Case, task: Entry, program: Sequence[str], failed: dict[str, str]) -> None:
    """A training over all batches leaves its teacher's rows behind, once for every kind of row."""
    filled: set[str] = set()
    for contender in case.contenders:
        if (
            contender.engine == "ours"
            and contender.teacher != "live"
            and contender.teacher not in filled
        ):
            try:
                ask_child(program, {**task, "contender": asdict(contender)}, keeps_memory=True)
                filled.add(contender.teacher)
            except ChildFailed as e:
                failed[contender.name] = str(e)
                print(f"{case.name} {contender.name} failed: {e}", flush=True)


def _run_one(
    contender: Contender, task: Entry, programs: dict[str, list[str]], num_warmup: int
) -> Entry:
    answer = ask_child(
        programs[contender.engine],
        {**task, "contender": asdict(contender)},
        keeps_memory=contender.engine == "ours" or contender.keeps_memory,
    )
    return {
        "ms": 1000 * median(answer["seconds"][num_warmup:]),
        "peak_bytes": answer["peak_bytes"],
        "first_loss": answer["losses"][0],
        "versions": answer["versions"],
        "all_ms": [round(1000 * s, 1) for s in answer["seconds"]],
    }


def _summary(case: Case, turns: list[Entry], floors: list[Entry], failed: dict[str, str]) -> Entry:
    measured = [c for c in case.contenders if c.name not in failed]
    contenders: Entry = {}
    for c in measured:
        mine = [turn[c.name] for turn in turns]
        contenders[c.name] = {
            **asdict(c),
            "ms": round(median(m["ms"] for m in mine), 1),
            "peak_bytes": int(median(m["peak_bytes"] for m in mine)),
            "first_loss": mine[0]["first_loss"],
            "turns_ms": [round(m["ms"], 1) for m in mine],
            "all_ms": [m["all_ms"] for m in mine],
            "versions": mine[0]["versions"],
        }
        if c.engine == "ours":
            found = [floor["contenders"][c.name] for floor in floors]
            seconds = median(f["seconds"] for f in found)
            contenders[c.name] |= {
                "gflop": round(found[0]["flop"] / 1e9, 1),
                "floor_ms": round(1000 * seconds, 1),
                # the stricter floor: as if every product ran at the rate of the fastest one
                "fraction_at_best_rate": _median(
                    1000 * f["flop"] / (1e9 * floor["best_gflops"]) / m["ms"]
                    for f, floor, m in zip(found, floors, mine, strict=True)
                ),
                "fraction_of_gemm_floor": _median(
                    1000 * f["seconds"] / m["ms"] for f, m in zip(found, mine, strict=True)
                ),
                # with our own float32 products where they are faster than the libraries'
                "fraction_of_own_floor": _median(
                    1000 * f["own_seconds"] / m["ms"] for f, m in zip(found, mine, strict=True)
                ),
            }
    return {
        **figures(turns, contenders),
        # what "trl" in the names stands for
        "reference": sorted({c.engine for c in case.contenders} - {"ours"}),
        "contenders": contenders,
        "failed": failed,
        "losses_differ": losses_differ(contenders),
        "floor": floors[-1] if floors else None,
        "num_turns": len(turns),
    }


def figures(turns: list[Entry], contenders: Entry) -> Entry:
    """The ratios against the reference with its faster allocator settings, None where one of the two is missing."""
    found: Entry = {}
    for name, (ours, theirs) in RATIOS.items():
        there = ours in contenders and theirs in contenders
        found[name] = (
            _median(_least(t, theirs, "ms") / t[ours]["ms"] for t in turns) if there else None
        )
    ours, theirs = MEMORY_OF
    there = ours in contenders and theirs in contenders
    found["peak_memory_ratio_vs_trl"] = (
        _median(t[ours]["peak_bytes"] / _least(t, theirs, "peak_bytes") for t in turns)
        if there
        else None
    )
    found["fraction_of_gemm_floor"] = contenders.get(FLOOR_OF, {}).get("fraction_of_gemm_floor")
    return found


def _least(turn: Entry, reference: str, key: str) -> float:
    """The smaller figure of a reference with and without the allocator settings that ours have."""
    names = [name for name in (reference, reference + KEEPS_MEMORY) if name in turn]
    return float(min(turn[name][key] for name in names))


def losses_differ(contenders: Entry) -> list[str]:
    """Names whose first loss is not what the others with their divergence have: then no ratio means anything."""
    odd = []
    for name in {c["divergence"] for c in contenders.values()}:
        same = {n: c["first_loss"] for n, c in contenders.items() if c["divergence"] == name}
        middle = median(same.values())
        odd += [n for n, loss in same.items() if abs(loss - middle) > LOSS_TOLERANCE * abs(middle)]
    return sorted(odd)


def _median(values: Iterable[float]) -> float:
    return round(median(values), 3)
