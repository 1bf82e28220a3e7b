"""Inputs of the training of one student."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from app.contracts.distillation import Hyperparameters, Objective
from app.contracts.messages import AdapterBase, ArtifactRef
from worker.distill.data.rows import Example
from worker.distill.data_parallel import ALONE, Ranks
from worker.distill.phase_times import PhaseTimes
from worker.distill.students.recipe import StudentRecipe
from worker.distill.teachers.cached_teacher import CachedTeacher
from worker.distill.teachers.signals import Signal
from worker.distill.training.devices import ON_CPU, Placement
from worker.distill.training.feature_losses import FeaturePlan
from worker.distill.training.rollouts import RolloutPlan


@dataclass(frozen=True)
class TrainingInputs:
    """Inputs of a training. The teacher has the rows of `train`, followed by those of `valid`."""

    out: Path
    objective: Objective
    hyperparameters: Hyperparameters
    seed: int
    keep_checkpoints: int
    recipe: StudentRecipe
    tokenizer: PreTrainedTokenizerBase
    num_tokens: int
    train: list[Example]
    valid: list[Example]
    teacher: CachedTeacher | None
    signal: Signal
    has_one_tokenizer: bool
    answers_path: Path | None
    inputs_sha256: str
    device: str
    resume_dir: Path | None = None
    best_dir: Path | None = None
    rollouts: RolloutPlan | None = None
    features: FeaturePlan | None = None
    finished_dirs: tuple[Path, ...] = ()  # students of the job's earlier student runs
    num_runs_after: int = 0  # student runs after this one, each with as many steps
    ranks: Ranks = ALONE
    autocast: torch.dtype | None = None  # autocast dtype of the student's layers, None: float32
    matmul_dtype: torch.dtype = torch.float32  # dtype of the student's matmuls on a CPU
    placement: Placement = ON_CPU
    start: ArtifactRef | None = None  # start model in the store, None outside of the service
    phases: PhaseTimes = field(default_factory=PhaseTimes)

    @property
    def adapter_base(self) -> AdapterBase:
        """The start model of the student's adapters, if it has any."""
        dtype = "bfloat16" if self.autocast == torch.bfloat16 else "float32"
        return AdapterBase(start=self.start, dtype=dtype)
