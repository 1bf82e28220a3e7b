"""What a card does: its tests, and the seconds and memory of a step with random weights of SmolLM2-135M's sizes.

    .venv/bin/python bench/gpu_check.py [--json FILE]

`make gpu-check` runs it, in under ten minutes. Without a card it says so and ends with status 2, so that nobody takes
it for a check that passed. Nothing is downloaded.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from app.contracts.distillation import DivergenceName, Objective
from worker.distill.data.batching import collate
from worker.distill.data.rows import Example
from worker.distill.forward.hidden_states import autocast, hidden_rows
from worker.distill.losses.divergences import TokenObjective
from worker.distill.losses.fused_loss import fused_distillation_loss
from worker.distill.losses.lm_head import Head, TeacherRows, head_of
from worker.distill.training.devices import Device, find_device

ROOT = Path(__file__).resolve().parents[1]
TEST_SECONDS = 360
NUM_WARM, NUM_TIMED = 3, 10
SIZES = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
NUM_LAYERS = 8
BATCHES = ((8, 128), (64, 256))  # rows, tokens; half of each row is completion
DIVERGENCES: tuple[DivergenceName, ...] = ("jsd", "forward_kl")

Entry = dict[str, Any]  # Any: open-ended JSON


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench/gpu_check.py", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    device = find_device()
    if device.name == "cpu":
        print("no CUDA device here: nothing was checked")
        return 2
    report: Entry = {"card": device.card, "driver": driver(), "torch": torch.__version__}
    print(f"{device.card}, driver {report['driver']}, torch {torch.__version__}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
    report["tests_status"] = subprocess.run(
        command, cwd=ROOT, timeout=TEST_SECONDS, check=False
    ).returncode
    report["steps"] = time_all(device)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1))
    return int(report["tests_status"])


def driver() -> str:
    """Its version, as nvidia-smi knows it."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.splitlines()[0]


def time_all(device: Device) -> list[Entry]:
    entries = []
    for num_rows, num_tokens in BATCHES:
        for divergence in DIVERGENCES:
            for dtype in dict.fromkeys((None, device.autocast)):
                entry = time_steps(device.name, num_rows, num_tokens, divergence, dtype)
                entries.append(entry)
                print(" ".join(f"{name}={value}" for name, value in entry.items()), flush=True)
    return entries


def time_steps(
    device: str,
    num_rows: int,
    num_tokens: int,
    divergence: DivergenceName,
    dtype: torch.dtype | None,
) -> Entry:
    """Of a student whose teacher's states are there already; the head is trained, which is the dearer case."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=NUM_LAYERS)).to(device)
    head = head_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(SIZES["vocab_size"], (num_rows, num_tokens)).tolist()
    examples = [Example(tuple(row), ((num_tokens // 2, num_tokens),)) for row in ids]
    batch = collate(examples, range(num_rows), device)
    teacher_head = Head(torch.randn_like(head.weight_VH) / 24)
    hidden_NH = torch.randn(batch.num_targets, SIZES["hidden_size"], device=device)
    teacher = TeacherRows(teacher_head, hidden_NH=hidden_NH)
    objective = TokenObjective.from_objective(Objective(divergence=divergence))

    def step() -> float:
        with autocast(device, dtype):
            states_NH = hidden_rows(model, batch)
        loss, _ = fused_distillation_loss(
            states_NH.float(),
            head,
            batch.targets_N,
            teacher,
            objective,
            denominator=batch.num_targets,
        )
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the card

    for _ in range(NUM_WARM):
        step()
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    for _ in range(NUM_TIMED):
        last_loss = step()
    seconds = (time.perf_counter() - begun) / NUM_TIMED
    return {
        "rows": num_rows,
        "tokens": num_tokens,
        "divergence": divergence,
        "body": str(dtype or torch.float32).removeprefix("torch."),
        "ms_per_step": round(1000 * seconds, 2),
        "tokens_per_second": round(num_rows * num_tokens / seconds),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
        "loss": round(last_loss, 4),
    }


if __name__ == "__main__":
    sys.exit(main())
