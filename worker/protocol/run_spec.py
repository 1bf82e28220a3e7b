"""What `python -m worker.train SPEC.json --out DIR` reads: the distillation block and where its inputs lie."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from app.contracts.distillation import Distillation
from app.contracts.messages import SPLIT_VERSION


class RunSpec(BaseModel):
    """One run. Folders are local: a supervisor (or a person) has laid them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    distillation: Distillation
    teacher_dir: Path
    start_dir: Path
    training_path: Path
    validation_path: Path | None = None
    test_path: Path | None = None  # rows that are judged at the end only
    split_version: int = SPLIT_VERSION
    cache_dir: Path
    cache_bytes: int = 20 * 2**30
    resume_dir: Path | None = None
    seed: int = 0
    num_threads: int = 0
    num_processes: int = 0  # 0: one a card
    keep_checkpoints: int = 2
