"""Cost of a run: its peak memory, and the time of its phases beside the expected time.

Estimates of later jobs are scaled by these figures (app.services.estimates).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from app.contracts.batch_plan import BatchPlan, batch_tokens_of, eval_steps_of
from app.contracts.distillation import Hyperparameters
from app.contracts.job_seconds import VERSION, reference_seconds
from app.contracts.model_sizes import ModelSizes, measure_model, read_shapes
from app.contracts.planned_jobs import PlannedJob, RowCounts, has_expected_rows
from app.contracts.run_limits import MAX_PLANNED_EPOCHS
from worker.distill.data.dataset import Rows
from worker.distill.data.rows import Example
from worker.distill.evaluation.label_metrics import find_labels
from worker.distill.missing_results import MissingPart, attempt
from worker.distill.model_pair import ModelPair
from worker.distill.phase_times import PhaseTimes
from worker.distill.training.checkpoint import TrainState
from worker.protocol.run_spec import RunSpec

Json = dict[str, Any]  # Any: part of the public result


def measure_folder(folder: Path) -> ModelSizes:
    """Returns the sizes of the model in a folder, from the headers of its files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            shapes |= read_shapes(file)
    return measure_model(shapes, json.loads((folder / "config.json").read_text()))


def planned_job(pair: ModelPair) -> PlannedJob:
    """Returns the numbers of the job that a run carries out."""
    spec = pair.spec
    is_same = spec.teacher_dir.resolve() == spec.start_dir.resolve()
    block = spec.distillation.model_copy(update={"objective": pair.objective})
    return PlannedJob(
        block=block,
        has_teacher=spec.has_teacher,
        teacher=measure_folder(spec.teacher_dir),
        start=measure_folder(spec.start_dir),
        has_expected_rows=has_expected_rows(block, is_same_model=is_same),
    )


def count_rows(
    spec: RunSpec,
    rows: Rows,
    *,
    num_steps: int,
    num_planned_steps: int,
    batch_tokens: int | None = None,
) -> RowCounts:
    """Returns the counts of the rows of a run, and of its steps.

    `num_steps` are those of the first student. It was trained for `num_planned_steps`, unless it
    stopped early. A step had at most `batch_tokens` tokens, by default those of a CPU.
    """
    h = spec.distillation.hyperparameters
    lengths = [example.num_tokens for example in rows.train]
    plan = BatchPlan(
        lengths,
        batch_tokens=batch_tokens or batch_tokens_of(h),
        seed=spec.seed,
        batch_rows=h.batch_rows,
    )
    num_held_out = sum(example.num_tokens for example in rows.valid)
    examples = [*rows.train, *rows.valid]
    valid_tokens = _tokens(rows.valid)
    num_test = 0
    if spec.test_path is not None:
        with spec.test_path.open("rb") as lines:
            num_test = sum(1 for _ in lines)
    return RowCounts(
        num_train=len(rows.train),
        num_valid=len(rows.valid),
        train_tokens=_tokens(rows.train),
        train_targets=_targets(rows.train),
        valid_tokens=valid_tokens,
        valid_targets=_targets(rows.valid),
        teacher_tokens=_tokens(rows.teacher),
        num_unanswered=rows.num_answered,
        prompt_tokens=sum(len(example.prompt_ids) for example in examples) / len(examples),
        answer_tokens=_targets(examples) / len(examples),
        longest_tokens=max(example.num_tokens for example in examples),
        num_steps=num_steps,
        num_epochs=_num_epochs(h, plan, num_steps, num_planned_steps),
        num_evals=-(-num_steps // eval_steps_of(h, plan, num_planned_steps, num_held_out)),
        num_test=num_test,
        test_tokens=num_test * valid_tokens // len(rows.valid),
        label_tokens=_label_tokens(rows),
    )


def _num_epochs(
    h: Hyperparameters, plan: BatchPlan, num_steps: int, num_planned_steps: int
) -> float:
    """Returns the epochs of a number of steps. Planning the batches of all epochs takes too long."""
    num_planned = min(h.n_epochs, MAX_PLANNED_EPOCHS)
    if h.max_steps is None and num_planned < h.n_epochs:
        return h.n_epochs * num_steps / num_planned_steps
    return min(h.n_epochs, num_planned * num_steps / plan.num_steps(num_planned))


def cost_of(
    pair: ModelPair,
    rows: Rows,
    phases: PhaseTimes,
    state: TrainState,
    num_computed: int,
    num_kept: int,
) -> Json:
    """Returns the entry `cost` of the result, or nothing if it cannot be computed.

    See `measured_cost` for the arguments.
    """
    cost = attempt(
        "cost",
        "cost_failed",
        lambda: measured_cost(pair, rows, phases, state, num_computed, num_kept),
    )
    return {} if isinstance(cost, MissingPart) else {"cost": cost}


def measured_cost(
    pair: ModelPair,
    rows: Rows,
    phases: PhaseTimes,
    state: TrainState,
    num_computed: int,
    num_kept: int,
) -> Json:
    """Returns the peak memory of a run, and its times beside the expected ones.

    `state` is that of the finished sweep. `num_computed` is the number of rows that the teacher has
    read, and `num_kept` that of rows whose states were kept while it answered. A resumed run has no times, because a part of its work was done before.
    """
    cost = {"device": pair.device, "peak_memory_bytes": peak_memory_bytes(pair.device)}
    if pair.spec.resume_dir is not None:
        return cost
    has_bfloat16 = pair.card.has_bfloat16
    counts = count_rows(
        pair.spec,
        rows,
        num_steps=max(1, state.finished[0]["num_steps"]),
        num_planned_steps=max(1, state.finished[0]["num_planned_steps"]),
        batch_tokens=state.batch_tokens,
    )
    expected = reference_seconds(
        planned_job(pair),
        counts,
        has_bfloat16=has_bfloat16,
        num_cached=len(rows.teacher) - num_computed - num_kept,
        num_kept=num_kept,
        num_processes=state.num_processes,
    )
    return {
        **cost,
        "version": VERSION,
        "has_bfloat16": has_bfloat16,
        "seconds": {name: round(value, 2) for name, value in phases.seconds.items()},
        "reference_seconds": {name: round(value, 2) for name, value in expected.items()},
    }


def peak_memory_bytes(device: str) -> int:
    """Returns the peak memory: of the GPU, or the largest resident size of this process."""
    if device == "cuda":
        return int(torch.cuda.max_memory_reserved())
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 0


def _tokens(examples: Sequence[Example]) -> int:
    """Returns the tokens that a model reads: the last token of a row is only a target."""
    return sum(example.num_tokens - 1 for example in examples)


def _targets(examples: Sequence[Example]) -> int:
    return sum(example.num_targets for example in examples)


def _label_tokens(rows: Rows) -> int | None:
    """Returns the length of the longest answer if the answers of the held-out rows are labels."""
    answers = [example.completion_ids for example in rows.valid]
    labels = find_labels([str(ids) for ids in answers], [len(ids) for ids in answers])
    return None if labels is None else labels.max_tokens
