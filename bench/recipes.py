"""Which recipe wins: the same student by several objectives, starts and seeds, judged on the same held-out rows.

    .venv/bin/python -m bench.recipes titles --teacher FOLDER --rows FOLDER [--seeds 3] [--only NAME ...] [--json FILE]
    .venv/bin/python -m bench.recipes smollm2|smollm2-half|demo --teacher FOLDER --packages FOLDER

Every run is a process of its own (`python -m bench.changed_training`); teacher answers, hidden states and fitted layers are
shared by all. `--start` names another model to start from (then as a checkpoint), `--init` another kind of student than the
teacher's layers. All else is a job's defaults, the learning rate among them. `demo` is the job of `make demo`. Quality only:
nothing here is timed. A run whose result is on file is not repeated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console
from rich.table import Table

from app.commands.demo import NUM_LAYERS, OPTIONS, demo_prompts, prompt_lines, split_prompts
from bench.children import KEEP_MEMORY

Json = dict[str, Any]  # Any: JSON
FORWARD_KL = {"divergence": "forward_kl"}
# Kept layers of SmolLM2 (15 of 30), and the layers of the teacher that the student's are fitted to.
SHALLOW = {"layers": [*range(2), *range(17, 30)], "num_layers": 15}
DEEP = {"layers": [*range(4), *range(19, 30)], "num_layers": 15}
DEEPER = {"layers": [*range(5), *range(20, 30)], "num_layers": 15}
FITTED_TO = [[layer, layer if layer < 3 else layer + 15] for layer in range(15)]
LONG = {"max_steps": 360}
RECIPES: dict[str, Json] = {
    "CE only": {"objective": {**FORWARD_KL, "ce_weight": 1.0}},
    "forward KL": {"objective": FORWARD_KL},
    "forward KL, then skew .1": {
        "objective": {**FORWARD_KL, "then": {"divergence": "skew_forward_kl"}}
    },
    "forward KL, then alpha-beta": {
        "objective": {**FORWARD_KL, "then": {"divergence": "alpha_beta"}}
    },
    "forward KL, then on-policy forward KL": {
        "objective": {**FORWARD_KL, "then": {"divergence": "forward_kl", "completions": "student"}}
    },
    "forward KL, then on-policy reverse KL": {
        "objective": {**FORWARD_KL, "then": {"divergence": "reverse_kl", "completions": "student"}}
    },
    "skew .1": {"objective": {"divergence": "skew_forward_kl"}},
    "alpha-beta": {"objective": {"divergence": "alpha_beta"}},
    "JSD .5": {"objective": {"divergence": "jsd"}},
    "reverse KL": {"objective": {"divergence": "reverse_kl"}},
    "first and last layers": {"student": {"layer_choice": "first_and_last"}},
    "layers not fitted": {"student": {"fit_rows": 0}},
    "first and last layers, not fitted": {
        "student": {"fit_rows": 0, "layer_choice": "first_and_last"}
    },
    "half the learning rate": {"hyperparameters": {"learning_rate_multiplier": 0.5}},
    "twice the learning rate": {"hyperparameters": {"learning_rate_multiplier": 2.0}},
    "four times the learning rate": {"hyperparameters": {"learning_rate_multiplier": 4.0}},
    "beta2 .99": {"change": {"betas": [0.9, 0.99], "averages": [0.8, 0.9, 0.97]}},
    "beta2 .999": {"change": {"betas": [0.9, 0.999]}},
    "linear decay": {"change": {"schedule": "linear"}},
    "constant, then decay": {"change": {"schedule": "wsd", "averages": [0.8, 0.9, 0.97]}},
    "warm-up .15": {"hyperparameters": {"warmup_ratio": 0.15}},
    "CE .3": {"objective": {**FORWARD_KL, "ce_weight": 0.3}},
    "temperature 2": {"objective": {**FORWARD_KL, "temperature": 2.0}},
    "head trained": {"student": {"freeze_head": False}},
    "layers 0-1 and 17-29": {"student": SHALLOW},
    "layers 0-3 and 19-29": {"student": DEEP},
    "layers 0-3 and 19-29, hidden states": {
        "student": DEEP,
        "objective": {**FORWARD_KL, "hidden": {"kind": "cosine", "layer_map": FITTED_TO}},
    },
    "layers 0-4 and 20-29": {"student": DEEPER},
    "layers 0-1 and 17-29, three times the steps": {"student": SHALLOW, "hyperparameters": LONG},
    "layers 0-3 and 19-29, three times the steps": {"student": DEEP, "hyperparameters": LONG},
    "half the learning rate, three times the steps": {
        "hyperparameters": {"learning_rate_multiplier": 0.5, **LONG}
    },
    "256 tokens a step, twice the steps": {
        "hyperparameters": {"batch_tokens": 256, "max_steps": 240}
    },
    "1024 tokens a step, half the steps": {
        "hyperparameters": {"batch_tokens": 1024, "max_steps": 60}
    },
}
TASKS: dict[str, Json] = {
    "titles": {
        "student": {"num_encoder_layers": 8, "num_decoder_layers": 4},
        "data": {"completions": "teacher", "temperature": 0.0, "max_new_tokens": 24},
        "hyperparameters": {"n_epochs": 1, "batch_tokens": 2048},
    },
    "smollm2-half": {
        "student": {"num_layers": 15},
        "data": {"completions": "teacher", "temperature": 0.0, "max_new_tokens": 48},
        "hyperparameters": {"n_epochs": 3, "max_steps": 120, "batch_tokens": 512},
    },
    "demo": {
        "student": {"num_layers": NUM_LAYERS},
        **OPTIONS,
    },
    "smollm2": {
        "student": {"num_layers": 8},
        "data": {"completions": "teacher", "temperature": 0.0, "max_new_tokens": 48},
        "hyperparameters": {"n_epochs": 3, "max_steps": 120, "batch_tokens": 512},
    },
}
OTHER_STUDENTS: dict[str, Json] = {
    "width": {"init": "width", "hidden_size": 384, "num_heads": 6},
    "fresh": {
        "init": "fresh",
        "config": {"family": "llama", "hidden_size": 384, "num_layers": 8, "num_heads": 6},
    },
}
FIGURES = {"kl": "{:.3f}", "agreement": "{:.3f}", "perplexity": "{:.2f}", "rouge_l": "{:.3f}"}
NUM_TRAIN, NUM_VALID = 720, 80


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.recipes", description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument(
        "--start", type=Path, help="a checkpoint to start from; else the teacher's layers"
    )
    parser.add_argument("--init", choices=OTHER_STUDENTS, help="of a Llama-like teacher")
    parser.add_argument("--rows", type=Path, help="folder with train.jsonl and valid.jsonl")
    parser.add_argument("--packages", type=Path, help="where the corpus of the demo's prompts lies")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--only", nargs="*", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--work", type=Path, default=Path(".stillhouse/recipes"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = arguments.rows or demo_rows(arguments)
    found: dict[str, list[Json]] = {}
    for name in arguments.only:
        for seed in range(arguments.seeds):
            found.setdefault(name, []).append(run(arguments, name, seed, rows))
            print(
                name,
                seed,
                {k: round(found[name][-1]["student"][k], 4) for k in FIGURES},
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    show(found)


def demo_rows(arguments: argparse.Namespace) -> Path:
    """The demo's prompts, shuffled; the teacher answers them in the first run."""
    sys.path.append(str(arguments.packages))
    folder: Path = arguments.work / ("demo-rows" if arguments.task == "demo" else "rows")
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.task == "demo":
        training, held_out = split_prompts()
        (folder / "train.jsonl").write_text(prompt_lines(training))
        (folder / "valid.jsonl").write_text(prompt_lines(held_out))
        return folder
    prompts = demo_prompts()
    Random(0).shuffle(prompts)
    parts = {"train": prompts[:NUM_TRAIN], "valid": prompts[NUM_TRAIN : NUM_TRAIN + NUM_VALID]}
    for name, part in parts.items():
        lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in part]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def run(arguments: argparse.Namespace, name: str, seed: int, rows: Path) -> Json:
    """The result object of one run."""
    start = arguments.start or arguments.teacher
    student = {"init": "layers", **TASKS[arguments.task]["student"]}
    if start != arguments.teacher:
        student = {"init": "checkpoint"}
    if arguments.init:
        student = OTHER_STUDENTS[arguments.init]
    kind = [arguments.init] if arguments.init else []
    words = name.replace(",", "").replace(".", "").split()
    out = arguments.work / "-".join([arguments.task, start.name, *kind, *words, str(seed)])
    out.mkdir(parents=True, exist_ok=True)
    spec = {
        "distillation": block_of(arguments.task, student, name, arguments.learning_rate),
        "teacher_dir": str(arguments.teacher),
        "start_dir": str(start),
        "training_path": str(rows / "train.jsonl"),
        "validation_path": str(rows / "valid.jsonl"),
        "cache_dir": str(arguments.work / "cache"),
        "seed": seed,
        "num_threads": arguments.threads,
        "keep_checkpoints": 1,
    }
    change = RECIPES[name].get("change", {})
    wanted = {"spec.json": json.dumps(spec), "change.json": json.dumps(change)}
    lines = out / "lines.jsonl"
    is_on_file = all((out / n).exists() and (out / n).read_text() == t for n, t in wanted.items())
    if not (lines.exists() and is_on_file):
        for file_name, text in wanted.items():
            (out / file_name).write_text(text)
        train(out, arguments.work / "fits", wanted["change.json"])
    result: Json = json.loads(lines.read_text().splitlines()[-1])["result"]
    if "averages" in change:
        result["averages"] = json.loads((out / "averages.json").read_text())
    return result


def block_of(task_name: str, student: Json, recipe_name: str, learning_rate: float | None) -> Json:
    """The distillation options of a run."""
    task, recipe = TASKS[task_name], RECIPES[recipe_name]
    numbers = {**task["hyperparameters"], **recipe.get("hyperparameters", {})}
    if learning_rate is not None:
        numbers["learning_rate"] = learning_rate
    return {
        "teacher": "teacher",
        "student": {**student, **recipe.get("student", {})},
        "data": task["data"],
        "objective": recipe.get("objective", FORWARD_KL),
        "hyperparameters": {**numbers, "eval_steps": 1_000_000},
        "evaluation": {"metrics": ["perplexity", "agreement", "rouge_l"], "num_samples": 0},
    }


def train(out: Path, fits: Path, change: str) -> None:
    """Trains by the spec in a folder, and leaves the run's lines there."""
    command = [sys.executable, "-m", "bench.changed_training", str(out / "spec.json")]
    command += ["--out", str(out), "--change", change, "--fits", str(fits)]
    with (out / "stderr").open("wb") as errors:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **KEEP_MEMORY},
            check=False,
        )
    if done.returncode:
        sys.exit(f"{out.name} failed: {done.stdout.decode().splitlines()[-1:]}; see {errors.name}")
    (out / "lines.jsonl").write_bytes(done.stdout)


def show(found: dict[str, list[Json]]) -> None:
    """Mean and range over seeds, beside the untrained student; in brackets the mean half-width of the 95% intervals."""
    table = Table("recipe", *FIGURES)
    untrained = next(iter(found.values()))[0]["untrained"]
    table.add_row("untrained", *(form.format(untrained[key]) for key, form in FIGURES.items()))
    for name, results in found.items():
        cells = []
        for key, form in FIGURES.items():
            values = [result["student"][key] for result in results]
            halves = [
                (high - low) / 2 for low, high in (r["student"]["intervals"][key] for r in results)
            ]
            spread = f"{form.format(min(values))}..{form.format(max(values))}"
            mean, half = form.format(statistics.mean(values)), form.format(statistics.mean(halves))
            cells.append(f"{mean} ({spread}) ±{half}")
        table.add_row(name, *cells)
        for decay in results[0].get("averages", {}):
            judged = [result["averages"][decay] for result in results]
            cells = [
                FIGURES[key].format(statistics.mean(j[key] for j in judged))
                for key in ("kl", "agreement")
            ]
            table.add_row(f"  the same, averages with decay {decay}", *cells)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
