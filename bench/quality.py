"""Time to quality: how long we train until the held-out KL is what TRL's GKD reaches in its budget.

Both start from 15 of the teacher's 30 layers (TRL from the first and the last ones, ours from those that it measures)
and learn from the same answers of the teacher, by the recipe that suits them best: bfloat16 where the processor
multiplies it itself, the best learning rate of those tried for TRL's trainer, our own defaults for ours. The seconds
are those of the training loop, the teacher's work, the choice and the fit of the layers included: TRL's teacher runs
at every step, our cache begins empty. Held-out evaluation, loading and saving count for neither. Our training needs
its length in advance, as every job does, so trainings of rising length are run until one reaches TRL's KL.
"""

import shutil
from pathlib import Path
from statistics import median

from bench.cases import Contender, Entry
from bench.children import ask_child, module, trl_program
from bench.steps import prepare
from worker.cpu.linear_ops import TRAINS_IN_BFLOAT16

# of TRL's budget; the last is the quality in the same time
SHARES = (
    0.1,
    0.12,
    0.17,
    0.21,
    0.25,
    0.35,
    0.5,
    1.0,
)
QUICK_SHARES = (0.25, 0.5, 1.0)
PILOT_STEPS = 8  # fewer misjudge the pace
TRL = Contender("trl", "trl", "forward_kl", "live")
TRL_RECIPE = {"learning_rate": 1e-3, "batch_rows": 8, "bf16": TRAINS_IN_BFLOAT16}
OURS = Contender("ours", "ours", "forward_kl", "expected", trains_head=False)
OUR_RECIPE = {
    "student": {"init": "layers", "num_layers": 15},
    "learning_rate": "auto",
    "batch_tokens": 512,
    "bf16": TRAINS_IN_BFLOAT16,
}


def measure_quality(
    *,
    work: Path,
    num_threads: int,
    num_turns: int,
    budget_seconds: float,
    shares: tuple[float, ...],
) -> Entry:
    """The medians over the turns (each with a seed of its own), and what each turn found."""
    models = prepare(work, "smollm2-15", num_threads=num_threads, wants_rows=True)
    task = {**models, "work": str(work), "num_threads": num_threads}
    untrained = _judge(task, Path(task["student_dir"]))
    turns = [_turn(task, seed, budget_seconds, shares) for seed in range(num_turns)]
    ratios = [t["time_to_quality_ratio"] for t in turns]
    return {
        "time_to_quality_ratio": None if None in ratios else round(median(ratios), 3),
        "minutes_to_quality": _over(turns, "minutes_to_quality"),
        "trl": {key: _over([t["trl"] for t in turns], key) for key in turns[0]["trl"]},
        "ours_in_the_same_time": {
            key: _over([t["ours_in_the_same_time"] for t in turns], key) for key in turns[0]["trl"]
        },
        "untrained": untrained,
        "budget_seconds": budget_seconds,
        "recipes": {"trl": TRL_RECIPE, "ours": OUR_RECIPE},
        "turns": turns,
    }


def _turn(task: Entry, seed: int, budget_seconds: float, shares: tuple[float, ...]) -> Entry:
    task = {**task, "seed": seed}
    work = Path(task["work"])
    out = work / "students" / "trl"
    theirs = ask_child(
        trl_program(work),
        {
            **task,
            **TRL_RECIPE,
            "do": "train",
            "contender": vars(TRL),
            "budget_seconds": budget_seconds,
            "student_out": str(out),
        },
        keeps_memory=True,  # its steps are faster so
    )
    theirs |= _judge(task, out)
    _tell("TRL", theirs)
    pace = _ask_ours(task, "time_pace", "pilot", num_steps=PILOT_STEPS)
    reached: Entry | None = None
    ours: list[Entry] = []
    for share in shares:
        if reached is not None and share < shares[-1]:
            continue
        num_steps = steps_within(share * budget_seconds, pace)
        out = work / "students" / "ours"
        made = _ask_ours(task, "train", "training", num_steps=num_steps, student_out=str(out))
        made |= _judge(task, out)
        _tell(f"ours, {share:.0%} of the time", made)
        ours.append({"share": share, **made})
        if reached is None and made["kl"] <= theirs["kl"]:
            reached = made
    return {
        "time_to_quality_ratio": None
        if reached is None
        else reached["seconds"] / theirs["seconds"],
        "minutes_to_quality": None if reached is None else reached["seconds"] / 60,
        "trl": theirs,
        "ours": ours,
        "ours_in_the_same_time": {key: ours[-1][key] for key in theirs},
        "pace": pace,
    }


def steps_within(seconds: float, pace: Entry) -> int:
    """How many steps there is time for, after the fit: those of the first epoch fill the teacher's cache and take longer."""
    seconds -= pace["fit"]
    num_filling: int = min(pace["num_batches"], int(max(0.0, seconds) / pace["filling"]))
    left = seconds - num_filling * pace["filling"]
    num_full = int(left / pace["full"]) if num_filling == pace["num_batches"] else 0
    return max(2, num_filling + num_full)


def _ask_ours(task: Entry, do: str, cache: str, **more: object) -> Entry:
    folder = Path(task["work"]) / "caches" / cache
    shutil.rmtree(folder, ignore_errors=True)  # it begins empty
    asked = {
        **task,
        **OUR_RECIPE,
        "do": do,
        "contender": vars(OURS),
        "cache_dir": str(folder),
        **more,
    }
    return ask_child(module("ours"), asked, keeps_memory=True)


def _judge(task: Entry, student_dir: Path) -> Entry:
    """By the same code, whoever trained the student."""
    cache_dir = Path(task["work"]) / "caches" / "judge"
    asked = {
        **task,
        "do": "judge",
        "contender": vars(OURS),
        "student_dir": str(student_dir),
        "cache_dir": str(cache_dir),
    }
    return ask_child(module("ours"), asked, keeps_memory=True)


def _over(turns: list[Entry], key: str) -> float | None:
    values = [turn[key] for turn in turns]
    return None if None in values else round(median(values), 4)


def _tell(who: str, made: Entry) -> None:
    print(
        f"quality {who}: {made['num_steps']} steps in {made['seconds']:.0f} s, KL {made['kl']:.3f}, "
        f"agreement {made['agreement']:.3f}, ROUGE-L {made['rouge_l']:.3f}",
        flush=True,
    )
