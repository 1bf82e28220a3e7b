"""Spec file that `python -m worker.train SPEC.json --out DIR` reads."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from app.contracts.distillation import Distillation
from app.contracts.messages import SPLIT_VERSION


class RunSpec(BaseModel):
    """Settings of one training run, and the local paths of its inputs.

    The supervisor fetches the inputs before it starts the run. If `num_threads` is 0, the run uses
    the number stored in the checkpoint, or else the default of PyTorch.

    Without a teacher (`has_teacher` false), `teacher_dir` is the folder of the start model, and the
    run learns from the completions in the rows alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    distillation: Distillation
    teacher_dir: Path
    start_dir: Path
    has_teacher: bool = True
    training_path: Path
    validation_path: Path | None = None
    test_path: Path | None = None  # rows for the final evaluation only
    split_version: int = SPLIT_VERSION
    cache_dir: Path
    cache_bytes: int = 20 * 2**30
    resume_dir: Path | None = None
    seed: int = 0
    num_threads: int = 0
    num_processes: int = 0  # 0: one per visible CUDA device
    keep_checkpoints: int = 2
