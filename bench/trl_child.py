"""TRL's GKDTrainer, run by a Python that has TRL and not this project: `python -P trl_child.py TASK.json`.

Its own `train` runs, with its own collating replaced by ready token ids, and its real `training_step` and
`compute_loss`: off-policy, float32, no gradient checkpointing, fused AdamW. Steps are timed between its callbacks
on_step_begin and on_step_end, which hold forward, backward, clipping and the optimizer. `device` and `teacher_dtype` of
a task are "cpu" and "float32" if they are left out.
"""

import json
import math
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer

Entry = dict[str, Any]  # Any: JSON between processes
BETAS = {"jsd": 0.5, "forward_kl": 0.0}
FOREVER = 10**6
WARMUP = 0.03


class Watched(GKDTrainer):  # type: ignore[misc]  # not known where this is checked
    """The trainer, with its losses written down; in the order of the rows if `keeps_order`."""

    keeps_order = False

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append((loss[0] if isinstance(loss, tuple) else loss).item())
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return (
            SequentialSampler(dataset)
            if self.keeps_order
            else super()._get_train_sampler(train_dataset)
        )


class Clock(TrainerCallback):  # type: ignore[misc]  # as above
    """Seconds of each step; ends the training when the budget is used up."""

    def __init__(self, budget_seconds: float) -> None:
        self.budget_seconds = budget_seconds
        self.seconds: list[float] = []
        self.started: float | None = None
        self.begun = 0.0
        self.ended = 0.0

    @property
    def elapsed(self) -> float:
        return 0.0 if self.started is None else time.perf_counter() - self.started

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun = time.perf_counter()
        if self.started is None:
            self.started = self.begun

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if is_cuda_used():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.begun)
        self.ended = self.elapsed
        control.should_training_stop |= self.elapsed >= self.budget_seconds


def collator(pad_id: int) -> Any:
    def collate(rows: list[Entry]) -> Entry:
        longest = max(len(row["token_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), pad_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for b, row in enumerate(rows):
            tokens = torch.tensor(row["token_ids"])
            ids[b, : len(tokens)] = tokens
            mask[b, : len(tokens)] = 1
            for start, end in row["spans"]:
                labels[b, start:end] = tokens[start:end]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return collate


def make_trainer(
    task: Entry, rows: list[Entry], clock: Clock, schedule: Any, max_steps: int
) -> Watched:
    torch.set_num_threads(task["num_threads"])
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(task[f"{name}_dir"], dtype=getattr(torch, dtype))
        for name, dtype in (
            ("student", "float32"),
            ("teacher", task.get("teacher_dtype", "float32")),
        )
    )
    if not task["contender"]["trains_head"]:
        student.get_output_embeddings().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(task["student_dir"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    args = GKDConfig(
        output_dir=str(Path(task["work"]) / "trl-output"),
        beta=BETAS[task["contender"]["divergence"]],
        lmbda=0.0,
        per_device_train_batch_size=task["batch_rows"],
        max_steps=max_steps,
        max_grad_norm=1.0,
        seed=task["seed"],
        use_cpu=task.get("device", "cpu") == "cpu",
        bf16=task.get("bf16", False),
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=task["learning_rate"], betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    trainer = Watched(
        model=student,
        teacher_model=teacher,
        args=args,
        data_collator=collator(tokenizer.pad_token_id),
        train_dataset=Dataset.from_list(
            [{k: row[k] for k in ("token_ids", "spans")} for row in rows]
        ),
        processing_class=tokenizer,
        callbacks=[clock],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)),
    )
    trainer.losses = []
    return trainer


def time_steps(task: Entry) -> Entry:
    rows = json.loads(Path(task["rows_path"]).read_text())["rows"]
    ordered = [rows[i] for batch in task["batches"] for i in batch]
    clock = Clock(math.inf)
    trainer = make_trainer(task, ordered, clock, lambda step: 1.0, len(task["batches"]))
    trainer.keeps_order = True
    trainer.train()
    return {
        "seconds": clock.seconds,
        "losses": trainer.losses,
        "peak_bytes": peak_bytes(),
        "versions": versions(),
    }


def train(task: Entry) -> Entry:
    """A training of `budget_seconds`; the learning rate warms up and falls to zero over just that time."""
    data = json.loads(Path(task["rows_path"]).read_text())
    clock = Clock(task["budget_seconds"])

    def schedule(_: int) -> float:
        share: float = min(1.0, clock.elapsed / task["budget_seconds"])
        if share < WARMUP:
            return max(share / WARMUP, 0.1)
        return 0.5 * (1 + math.cos(math.pi * (share - WARMUP) / (1 - WARMUP)))

    trainer = make_trainer(task, data["rows"][: data["num_train"]], clock, schedule, FOREVER)
    trainer.train()
    trainer.model.save_pretrained(task["student_out"])
    return {"seconds": clock.ended, "num_steps": len(clock.seconds), "peak_bytes": peak_bytes()}


def is_cuda_used() -> bool:
    """Returns True once this process has begun to use a GPU."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def peak_bytes() -> int:
    if is_cuda_used():
        return int(torch.cuda.max_memory_allocated())
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("no VmHWM in /proc/self/status: the bench needs Linux")


def versions() -> Entry:
    found: Entry = {"python": platform.python_version(), "threads": torch.get_num_threads()}
    return found | {package: version(package) for package in ("torch", "transformers", "trl")}


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    ops = {"time_steps": time_steps, "train": train}
    Path(task["answer"]).write_text(json.dumps(ops[task["do"]](task)))


if __name__ == "__main__":
    main()
