"""What a distilled draft brings: the teacher alone against the teacher with a draft, the same greedy text or not.

    .venv/bin/python bench/speculative.py [--prompts 100] [--json FILE]

The draft has a few of SmolLM2-135M-Instruct's 30 layers and learns from its answers (forward KL, under eight minutes on
two cores; kept in the work folder). Prompts are held out. Texts are compared first, then everyone is timed in turns, in
our engine without HTTP, with one, four and eight callers. The draft is made to work with eight, too, where the service
would let it rest.

`--random-teacher` measures a teacher of 1.2 billion random weights instead, in bfloat16, with its first layer as the
draft. The later layers of the teacher add little, so that the draft's proposals are often accepted. Only the speed
means anything.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from app.commands.demo import demo_prompts
from bench.cases import Entry
from bench.children import ROOT, ChildFailed, ask_child, model_packages, module
from bench.distill import machine
from bench.prepare import made
from bench.steps import prepare
from worker.distill.students.layer_dropping import keep_layers

NUM_HELD_OUT, NUM_TRAIN, NUM_VALID = 100, 600, 20
MAX_TOKENS = 64
NUM_DRAFT_TOKENS = (2, 4)
TEXT_CALLERS = 8
LOADS = ((1, 12), (4, 16), (8, 24))  # callers and prompts
RANDOM_LOADS = ((1, 6), (4, 8))
RANDOM_SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
LM_HEAD_FACTOR = 25.0  # makes the random logits peaked
LATER_LAYERS = 0.02  # factor of what all layers but the first add to their input
PARTS = ("texts", "speed")


def main() -> int:
    arguments = parse()
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    teacher_dir = prepare(work, "smollm2-15", num_threads=arguments.threads)["teacher_dir"]
    loads: tuple[tuple[int, int], ...] = LOADS
    weights = "plain"
    sys.path.append(str(model_packages(work)))  # where demo_prompts looks for the corpus
    prompts = demo_prompts()
    Random(0).shuffle(prompts)
    if arguments.random_teacher:
        tokenizer_dir, pair_dir = Path(teacher_dir), work / "models" / "random-pair"
        pair = made(pair_dir, lambda folder: make_random_pair(folder, tokenizer_dir))
        teacher_dir, draft_dir = str(pair / "teacher"), pair / "draft"
        loads, weights, arguments.only = RANDOM_LOADS, "bfloat16", ["speed"]
    else:
        draft_dir = arguments.draft or made(
            work / "models" / f"draft-{arguments.layers}",
            lambda folder: train(folder, Path(teacher_dir), prompts[NUM_HELD_OUT:], arguments),
        )
    task: Entry = {
        "work": str(work),
        "num_threads": arguments.threads,
        "teacher_dir": teacher_dir,
        "draft_dir": str(draft_dir.resolve()),
        "prompts": prompts[: min(arguments.prompts, NUM_HELD_OUT)],
        "max_tokens": MAX_TOKENS,
        "num_draft_tokens": arguments.draft_tokens,
        "text_callers": TEXT_CALLERS,
        "loads": loads,
        "weights": weights,
        "do": arguments.only,
    }
    report: Entry = {"machine": machine(), "draft": draft_dir.name}
    report |= ask_child(module("drafted"), task, keeps_memory=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1))
    show(Console(width=130), report)
    return 0 if all(not text["parted"] for text in report.get("texts", {}).values()) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/speculative.py", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--prompts", type=int, default=NUM_HELD_OUT, help=f"at most {NUM_HELD_OUT}")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--draft", type=Path, help="folder of a draft; else one is trained")
    parser.add_argument("--layers", type=int, default=4, help="of the draft")
    parser.add_argument("--random-teacher", action="store_true", help="1.2 B random weights")
    parser.add_argument("--draft-tokens", type=int, nargs="*", default=list(NUM_DRAFT_TOKENS))
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--work", type=Path, default=Path(".stillhouse/bench"), help="kept between runs"
    )
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def make_random_pair(folder: Path, tokenizer_dir: Path) -> None:
    """Saves a random teacher and its first layer as a draft, with the tokenizer of another model."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    sizes = {**RANDOM_SIZES, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.bfloat16)
    with torch.no_grad():
        for layer in teacher.model.layers[1:]:
            layer.self_attn.o_proj.weight.mul_(LATER_LAYERS)
            layer.mlp.down_proj.weight.mul_(LATER_LAYERS)
        teacher.lm_head.weight.mul_(LM_HEAD_FACTOR)  # or no token is likely enough to be proposed
    for name, model in (("teacher", teacher), ("draft", keep_layers(teacher, [0]))):
        model.to(torch.bfloat16).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def train(
    folder: Path, teacher_dir: Path, prompts: list[str], arguments: argparse.Namespace
) -> None:
    """Distils a draft into the folder, as a job would."""
    run = folder / "run"
    run.mkdir()
    parts = {"train": prompts[:NUM_TRAIN], "valid": prompts[NUM_TRAIN : NUM_TRAIN + NUM_VALID]}
    for name, part in parts.items():
        lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in part]
        (run / f"{name}.jsonl").write_text("".join(lines))
    spec = {
        "distillation": {
            "teacher": "teacher",
            "student": {"init": "layers", "num_layers": arguments.layers},
            "data": {"completions": "teacher", "temperature": 0.0, "max_new_tokens": MAX_TOKENS},
            "objective": {"divergence": "forward_kl"},
            "hyperparameters": {
                "n_epochs": 2,
                "max_steps": 200,
                "batch_tokens": 512,
                "learning_rate": 2e-3,
                "eval_steps": 1_000_000,
            },
            "evaluation": {"metrics": ["agreement"], "num_samples": 0},
        },
        "teacher_dir": str(teacher_dir),
        "start_dir": str(teacher_dir),
        "training_path": str(run / "train.jsonl"),
        "validation_path": str(run / "valid.jsonl"),
        "cache_dir": str(run / "cache"),
        "seed": 0,
        "num_threads": arguments.threads,
        "keep_checkpoints": 1,
    }
    (run / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, "-m", "worker.train", str(run / "spec.json"), "--out", str(run)]
    begun = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False
    )
    last = json.loads(done.stdout.splitlines()[-1])
    if done.returncode:
        raise ChildFailed(f"the draft could not be trained: {last}")
    for path in (run / last["folder"]).iterdir():
        path.rename(folder / path.name)
    shutil.rmtree(run)
    shown = {
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "student": last["result"]["student"],
    }
    (folder / "training.json").write_text(json.dumps(shown))
    print(f"trained {folder.name}: {shown}", flush=True)


def show(console: Console, report: Entry) -> None:
    table = Table(
        "draft tokens", "same text", "accepted", "tokens a call", "callers", "tokens/s", "speed-up"
    )
    for k, text in report.get("texts", {}).items():
        same = f"{text['num_identical']} of {text['num_prompts']}"
        table.add_row(
            k, same, f"{text['acceptance_rate']:.1%}", f"{text['tokens_a_call']:.2f}", "", "", ""
        )
        for parted in text["parted"]:
            console.print(f"parted: {parted}", highlight=False)
    for callers, by_draft in report.get("speed", {}).items():
        for k, found in by_draft.items():
            rate, speed_up = f"{found['tokens_per_second']:.1f}", f"{found['speed_up']:.2f}"
            accepted, per_call = found.get("acceptance_rate"), found.get("tokens_a_call")
            counts = ("", "") if accepted is None else (f"{accepted:.1%}", f"{per_call:.2f}")
            table.add_row(k, "", *counts, callers, rate, speed_up)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
