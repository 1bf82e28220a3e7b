"""The bench's figures as a table to read."""

from rich.console import Console
from rich.table import Table

from bench.cases import REFERENCE, Entry

TARGETS = {
    "ratio_cached_vs_trl": "≥ 5",
    "ratio_live_vs_trl": "≥ 2.5",
    "ratio_fkl_cached_vs_trl": "≥ 3.5",
    "ratio_fkl_live_vs_trl": "≥ 1.5",
    "peak_memory_ratio_vs_trl": "≤ 0.5",
    "fraction_of_gemm_floor": "≥ 0.8",
    "time_to_quality_ratio": "≤ 0.25",
}


def show(console: Console, report: Entry) -> None:
    for name, case in report["cases"].items():
        if "contenders" in case:
            _show_steps(console, name, case)
        else:
            _show_quality(console, case)
    table = Table(title="Figures")
    for heading in ("figure", "measured", "target"):
        table.add_column(heading)
    for key, target in TARGETS.items():
        table.add_row(key, _number(report[key], 3), target)
    console.print(table)


def _show_steps(console: Console, name: str, case: Entry) -> None:
    title = f"{name}: one step, median of {case['num_turns']} turns; times: the reference's ms over this"
    table = Table(title=title)
    for heading in (
        "contender",
        "engine",
        "divergence",
        "teacher",
        "head",
        "ms",
        "times",
        "peak GB",
        "floor",
    ):
        table.add_column(heading)
    for key, c in case["contenders"].items():
        head = "trained" if c["trains_head"] else "frozen"
        what = (key, c["engine"], c["divergence"], c["teacher"], head)
        reference = case["contenders"].get(REFERENCE[c["divergence"]], {}).get("ms")
        times = None if reference is None else reference / c["ms"]
        measured = (_number(c["ms"], 0), _number(times, 2), _number(c["peak_bytes"] / 1e9, 2))
        table.add_row(*what, *measured, _number(c.get("fraction_of_gemm_floor"), 2))
    for key in case["failed"]:
        table.add_row(key, "failed")
    console.print(table)
    if case["losses_differ"]:
        console.print(f"[bold]The first losses differ[/bold]: {', '.join(case['losses_differ'])}")


def _show_quality(console: Console, case: Entry) -> None:
    table = Table(title=f"quality: TRL's budget {case['budget_seconds']:.0f} s, held-out rows")
    for heading in (
        "run",
        "seconds",
        "steps",
        "KL",
        "agreement",
        "perplexity",
        "ROUGE-L",
        "peak GB",
    ):
        table.add_column(heading)
    rows = {"untrained": case["untrained"], "TRL": case["trl"]}
    rows |= {f"ours, {run['share']:.0%}": run for run in case["turns"][0]["ours"]}
    rows["ours, the same time (median)"] = case["ours_in_the_same_time"]
    for name, run in rows.items():
        peak = run.get("peak_bytes")
        figures = (_number(run.get("seconds"), 0), _number(run.get("num_steps"), 0))
        scores = [_number(run[key], 3) for key in ("kl", "agreement", "perplexity", "rouge_l")]
        table.add_row(name, *figures, *scores, _number(None if peak is None else peak / 1e9, 2))
    console.print(table)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
