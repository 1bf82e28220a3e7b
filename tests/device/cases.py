"""Cases that run in one child process: `python -m tests.device.cases SHIM FOLDERS OUTPUT [CASE...]`.

Each returns what it has observed. The tests of this folder compare that with what is expected.
"""

import sys
from pathlib import Path

from tests.device.shim import load_shim

if __name__ == "__main__":  # before the first import of torch
    load_shim(Path(sys.argv[1]))

import json
import traceback
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from app.contracts.distillation import Hyperparameters, Student
from tests.device import generation_cases, preparation_cases
from tests.device.fake_cuda import fake_cuda
from tests.device.op_log import OpLog
from tests.device.trainers import cached_teacher_of, storing_teacher_of, trainer_of
from worker.distill.training import checkpoint
from worker.distill.training.devices import Placement, find_device
from worker.distill.training.trainer import Trainer

Json = dict[str, Any]  # Any: open-ended JSON


def training_step(folders: Path) -> Json:
    """A step with a teacher that runs at every step."""
    with fake_cuda():
        return step_of(trainer_of(folders / "llama"))


def seq2seq_step(folders: Path) -> Json:
    """The same for an encoder-decoder."""
    with fake_cuda():
        return step_of(trainer_of(folders / "t5", source_tokens=9))


def cached_step(folders: Path) -> Json:
    """A step that reads the teacher's rows from the row cache."""
    with fake_cuda():
        return step_of(trainer_of(folders / "llama", taught_by=cached_teacher_of))


def storing_step(folders: Path) -> Json:
    """A step for which the live teacher computes rows of the row cache."""
    with fake_cuda():
        hyperparameters = Hyperparameters(batch_tokens=512)
        return step_of(
            trainer_of(
                folders / "llama", taught_by=storing_teacher_of, hyperparameters=hyperparameters
            )
        )


def lora_step(folders: Path) -> Json:
    """A step of a student with LoRA adapters."""
    with fake_cuda():
        return step_of(trainer_of(folders / "llama", student=Student(init="lora")))


def accumulated_step(folders: Path) -> Json:
    """A step of several micro-batches."""
    hyperparameters = Hyperparameters(batch_tokens=64, batch_rows=8)
    with fake_cuda():
        return step_of(trainer_of(folders / "llama", hyperparameters=hyperparameters))


def step_of(trainer: Trainer) -> Json:
    """Observes the second step of a trainer. The first one creates the optimizer's state."""
    with OpLog():
        trainer._step(trainer._next_pieces())
    with OpLog() as log:
        pieces = trainer._next_pieces()
        trainer._step(pieces)
    parameters = list(trainer.model.parameters())
    state = trainer.optimizer.state
    return {
        "waits": log.waits,
        "num_pieces": len(pieces),
        "matmul_dtypes": log.num_of_dtypes("mm"),
        "parameter_dtypes": sorted({str(p.dtype) for p in parameters}),
        "parameter_devices": sorted({p.device.type for p in parameters}),
        "num_trained": sum(p in state for p in parameters),
        "optimizer_devices": sorted(
            {t.device.type for p in parameters for t in state.get(p, {}).values()}
        ),
    }


def evaluation(folders: Path) -> Json:
    """The evaluation of the student on the held-out rows during the training."""
    with fake_cuda():
        trainer = trainer_of(folders / "llama")
        with OpLog() as log:
            trainer.measure()
        return {
            "waits": log.waits,
            "matmul_dtypes": log.num_of_dtypes("mm"),
            "num_head_matmuls": 2 * len(trainer.valid.batches),  # of the student and the teacher
        }


def activation_checkpointing(folders: Path) -> Json:
    """The bfloat16 matmuls of a step: plain, with checkpointing, and with transformers' switch."""
    seen: Json = {}
    with fake_cuda():
        for name in ("plain", "checkpointed", "switch_of_transformers"):
            device = find_device()
            is_on = name == "checkpointed"
            placement = Placement(device, "cuda", torch.bfloat16, has_checkpointing=is_on)
            trainer = trainer_of(folders / "llama", placement=placement)
            if name == "switch_of_transformers":
                trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
            pieces = trainer._next_pieces()
            with OpLog() as log:
                trainer._step(pieces)
            seen[name] = log.num_of_dtypes("mm")["torch.bfloat16"] / len(pieces)
    return seen


def resume(folders: Path) -> Json:
    """The devices of the optimizer after a resume, for a fused AdamW."""
    with fake_cuda():
        trainer = trainer_of(folders / "llama")
        with OpLog():
            trainer._step(trainer._next_pieces())
        folder = trainer.setup.out
        tensors = {
            f"{name}.{key}": value.cpu()
            for name, parameter in trainer.model.named_parameters()
            for key, value in trainer.optimizer.state[parameter].items()
        }
        files = {
            "optimizer.safetensors": tensors,
            "rng.safetensors": {"cpu": torch.zeros(5056, dtype=torch.uint8)},
        }
        other = trainer_of(folders / "llama")
        with (
            patch.object(checkpoint, "load_file", lambda path: files[path.name]),
            patch.object(torch, "set_rng_state"),
        ):
            checkpoint.load_optimizer(folder, other.optimizer, other.model)
        with OpLog():
            other._step(other._next_pieces())
        return {
            "devices": {
                key: sorted({state[key].device.type for state in other.optimizer.state.values()})
                for key in ("step", *checkpoint.MOMENTS)
            }
        }


CASES: dict[str, Callable[[Path], Json]] = {
    case.__name__: case
    for case in (
        training_step,
        seq2seq_step,
        cached_step,
        storing_step,
        lora_step,
        accumulated_step,
        evaluation,
        activation_checkpointing,
        resume,
        *preparation_cases.CASES,
        *generation_cases.CASES,
    )
}


def main() -> None:
    """Runs all cases and writes their observations, or the traceback of a case that failed."""
    folders, output, *names = map(Path, sys.argv[2:])
    torch.set_num_threads(1)
    seen: dict[str, Json] = {}
    for name, case in CASES.items():
        if names and Path(name) not in names:
            continue
        try:
            seen[name] = case(folders)
        except Exception:  # noqa: BLE001  # the test of this case reports it
            seen[name] = {"error": traceback.format_exc()}
        output.write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
