"""Cases that run in one child process: `python -m tests.device.cases SHIM FOLDERS OUTPUT`.

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

from tests.device.fake_cuda import fake_cuda
from tests.device.op_log import OpLog
from tests.device.trainers import trainer_of
from worker.distill.training import checkpoint

Json = dict[str, Any]  # Any: open-ended JSON


def training_step(folders: Path) -> Json:
    """A step of the trainer after the first, with a teacher that runs at every step."""
    with fake_cuda():
        trainer = trainer_of(folders / "llama")
        with OpLog():
            trainer._step(trainer._next_pieces())
        with OpLog() as log:
            trainer._step(trainer._next_pieces())
        parameters = list(trainer.model.parameters())
        state = trainer.optimizer.state
        return {
            "waits": log.waits,
            "matmul_dtypes": log.num_of_dtypes("mm"),
            "parameter_dtypes": sorted({str(p.dtype) for p in parameters}),
            "parameter_devices": sorted({p.device.type for p in parameters}),
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
    case.__name__: case for case in (training_step, evaluation, resume)
}


def main() -> None:
    """Runs all cases and writes their observations, or the traceback of a case that failed."""
    folders, output = Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    seen: dict[str, Json] = {}
    for name, case in CASES.items():
        try:
            seen[name] = case(folders)
        except Exception:  # noqa: BLE001  # the test of this case reports it
            seen[name] = {"error": traceback.format_exc()}
        output.write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
