"""Spec file that `python -m worker.train SPEC.json --out DIR` reads."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from app.contracts.distillation import Distillation
from app.contracts.messages import SPLIT_VERSION, ArtifactRef


class RunSpec(BaseModel):
    """Settings of one training run, and the local paths of its inputs.

    The supervisor fetches the inputs before it starts the run. If `num_threads` is 0, the run uses
    the number stored in the checkpoint, or else the default of PyTorch.

    Without a teacher (`has_teacher` false), `teacher_dir` is the folder of the start model, and the
    run learns from the completions in the rows alone.

    start: The start model in the store. None if the run was not started by the service.
    adapter_starts: For each folder that holds adapters in place of weights, the folder of their
        start model, which may be such a folder itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    distillation: Distillation
    teacher_dir: Path
    start_dir: Path
    start: ArtifactRef | None = None
    adapter_starts: dict[Path, Path] = {}
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
