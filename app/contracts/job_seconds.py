"""Time of a training job by phase, on a reference machine: two cores that multiply bfloat16.

Other machines are slower or faster by a factor, which is measured: by the phases of finished jobs,
or by a matmul. bench/estimates.py compares the estimates with real jobs, and bench/LOG.md has the
figures.

N processes on as many GPUs divide the rows of a batch, those of the teacher's row cache, and the
held-out rows during the training. This time is divided by N. All other work is done by the first
process, or by each of them: the teacher's answers, layer fitting, the optimizer, the report and
saving. The exchange of gradients is not counted.
"""

from collections.abc import Mapping
from typing import Final, Literal

from app.contracts.model_sizes import ModelSizes
from app.contracts.planned_jobs import PlannedJob, RowCounts
from app.contracts.run_limits import (
    CHOICE_ROWS,
    FIT_ROWS,
    MAX_RUNNING,
    NUM_TIMED,
    TIMED_TOKENS,
    WARM_UP_TOKENS,
)

Phase = Literal["start", "teacher", "layer_fit", "training", "evaluation", "saving"]
PHASES: Final[tuple[Phase, ...]] = (
    "start",
    "teacher",
    "layer_fit",
    "training",
    "evaluation",
    "saving",
)
# Estimates of other versions of this module are not compared with those of this one.
VERSION: Final = 1

REFERENCE_FLOPS: Final = 260e9  # per second, of a large bfloat16 matmul
BODY_FLOPS: Final = 150e9  # per second, of a model's layers in training
HEAD_FLOPS: Final = 90e9  # of the LM head, which multiplies more exactly
FLOAT32_FACTOR: Final = 0.5  # speed of float32 matmuls, relative to bfloat16
FORWARD_FLOPS: Final = 150e9  # of a forward pass alone
FIT_FLOPS: Final = 60e9  # of layer fitting
READ_BYTES: Final = 6e9  # per second, of weights that are read by a decode step
WRITE_BYTES: Final = 0.35e9  # per second, of a checkpoint that is written, synced and hashed twice
LOAD_BYTES: Final = 0.8e9  # per second, of weights that are read, hashed and converted
OPTIMIZER_PARAMETERS: Final = 0.5e9  # per second
LAYER_CALL_SECONDS: Final = 0.0015  # overhead of a layer in a training step
LAYER_DECODE_SECONDS: Final = 0.0004  # overhead of a layer in a decode step
STEP_SECONDS: Final = 0.006  # overhead of a step
START_SECONDS: Final = 6.0  # process start, imports, and the supervisor's work before them
ROW_SECONDS: Final = 0.0006  # reading and encoding a row
SAVE_SECONDS: Final = 1.0  # export, model card and registration
CHECKPOINT_SECONDS: Final = 0.3

# Speed measurement of the final evaluation: (sequences, tokens).
TIMED: Final = ((NUM_TIMED, WARM_UP_TOKENS), (1, TIMED_TOKENS), (NUM_TIMED, TIMED_TOKENS))


def reference_seconds(
    job: PlannedJob,
    rows: RowCounts,
    *,
    has_bfloat16: bool,
    num_cached: int = 0,
    num_kept: int = 0,
    num_processes: int = 1,
) -> dict[Phase, float]:
    """Returns the seconds of each phase on the reference machine.

    num_cached: Number of rows whose teacher outputs are in the cache already.
    num_kept: Number of rows that the teacher need not read, because their states are kept while it
        answers.
    num_processes: Number of processes that share each batch.
    """
    speed = 1.0 if has_bfloat16 else FLOAT32_FACTOR
    models = [job.start, *([job.teacher] if job.has_teacher else [])]
    return {
        "start": START_SECONDS + sum(model.num_bytes for model in models) / LOAD_BYTES,
        "teacher": _teacher(job, rows, speed, (num_cached, num_kept), num_processes),
        "layer_fit": _layer_fit(job, rows, speed),
        "training": _training(job, rows, speed, num_processes),
        "evaluation": _evaluation(job, rows, speed, num_processes),
        "saving": _saving(job, rows),
    }


def total(seconds: Mapping[Phase, float]) -> float:
    """Returns the sum over all phases."""
    return sum(seconds.values())


def _head_passes(job: PlannedJob, *, backward: bool) -> int:
    """Returns how often the loss multiplies by the LM head, for each target."""
    passes = 1 + (job.uses_rows_of_teacher and not job.has_expected_rows)
    return passes + (1 + job.trains_head if backward else 0)


def _forward(model: ModelSizes, num_tokens: float, speed: float) -> float:
    return 2 * model.layer_parameters * num_tokens / (FORWARD_FLOPS * speed)


def _head(model: ModelSizes, num_targets: float, speed: float) -> float:
    return 2 * model.head_parameters * num_targets / (HEAD_FLOPS * speed)


def decode_seconds(
    model: ModelSizes, num_sequences: float, prompt_tokens: float, new_tokens: float, speed: float
) -> float:
    """Returns the time to answer prompts: the prefill, and one step for each further token."""
    if num_sequences <= 0:
        return 0.0
    rounds = -(-num_sequences // MAX_RUNNING)
    together = num_sequences / rounds
    per_step = 2 * model.num_parameters * together / (FORWARD_FLOPS * speed)
    per_step = max(per_step, (4 - 2 * (speed == 1.0)) * model.num_parameters / READ_BYTES)
    per_step += model.num_layers * LAYER_DECODE_SECONDS + STEP_SECONDS
    prefill = _forward(model, num_sequences * prompt_tokens, speed)
    return prefill + rounds * new_tokens * per_step


def _teacher(
    job: PlannedJob, rows: RowCounts, speed: float, num_stored: tuple[int, int], num_processes: int
) -> float:
    seconds = (rows.num_train + rows.num_valid + rows.num_test) * ROW_SECONDS
    if not job.has_teacher:
        return seconds
    data = job.block.data
    seconds += decode_seconds(
        job.teacher,
        rows.num_unanswered,
        rows.prompt_tokens,
        # the longest answers of a batch decide how long it takes
        min(data.max_new_tokens, 1.5 * rows.answer_tokens),
        speed,
    )
    if job.uses_rows_of_teacher:
        num_cached, num_kept = num_stored
        num_rows = max(1, rows.num_train + rows.num_valid)
        share = (1 - min(1.0, num_cached / num_rows)) / num_processes
        share_read = max(0.0, share - num_kept / num_rows)
        seconds += share_read * _forward(job.teacher, rows.teacher_tokens, speed)
        if job.has_expected_rows:  # the logits, their softmax, and the expectation of head rows
            targets = rows.train_targets + rows.valid_targets
            seconds += share * 3 * _head(job.teacher, targets, speed)
        seconds += job.teacher.num_bytes / LOAD_BYTES
        seconds += _forward(job.teacher, rows.test_tokens, speed)
    if job.keeps_teacher:
        seconds += rows.num_epochs * _forward(job.teacher, rows.train_tokens, speed) / num_processes
    return seconds


def _layer_fit(job: PlannedJob, rows: RowCounts, speed: float) -> float:
    if not job.fits_layers:
        return 0.0
    fit_rows = job.block.student.fit_rows
    per_row = rows.train_tokens / max(1, rows.num_train)
    num_tokens = per_row * min(rows.num_train, FIT_ROWS if fit_rows == "auto" else fit_rows)
    choice_tokens = per_row * min(rows.num_train, CHOICE_ROWS)
    seconds = job.start.num_bytes / LOAD_BYTES + _forward(job.start, choice_tokens, speed)
    for sizes in job.students:
        H, F = sizes.hidden_size, sizes.mlp_size  # widths: hidden, feed-forward
        per_layer = 2 * num_tokens * (H * H + F * F + H * (H + F))
        per_layer += 4 * (H**3 / 3 + F**3 / 3 + 2 * H * (H * H + F * F))  # solved in float64
        seconds += sizes.num_layers * per_layer / FIT_FLOPS
        seconds += _forward(job.start, num_tokens, speed) + _forward(sizes, num_tokens, speed)
        seconds += job.start.num_bytes / LOAD_BYTES
    return seconds


def _training(job: PlannedJob, rows: RowCounts, speed: float, num_processes: int) -> float:
    num_epochs = rows.num_epochs
    num_tokens = num_epochs * rows.train_tokens / num_processes  # of one process
    num_targets = num_epochs * rows.train_targets / num_processes
    runs = list(zip(job.students, job.trained, strict=True))
    if job.block.evaluation.ce_baseline:
        runs.append(runs[-1])
    seconds = 0.0
    for sizes, trained in runs:
        passes = 3 if trained > sizes.num_parameters // 4 else 2.2
        seconds += passes * 2 * sizes.layer_parameters * num_tokens / (BODY_FLOPS * speed)
        seconds += _head_passes(job, backward=True) * _head(sizes, num_targets, speed)
        per_step = trained / OPTIMIZER_PARAMETERS + sizes.num_layers * LAYER_CALL_SECONDS
        seconds += rows.num_steps * (per_step + STEP_SECONDS)
        share = _generated_share(job)
        if share:
            prompts = share * num_epochs * rows.num_train
            new_tokens = job.block.data.max_new_tokens
            seconds += decode_seconds(sizes, prompts, rows.prompt_tokens, new_tokens, speed)
    return seconds


def _generated_share(job: PlannedJob) -> float:
    """Returns the share of batches that the student generates itself."""
    data, then = job.block.data, job.block.objective.then
    share = {"student": data.student_share, "replay": 0.3}
    whole = share.get(data.completions or "", 0.0)
    if then is not None and then.completions is not None:
        whole = whole * then.at + share[then.completions] * (1 - then.at)
    return whole


def _evaluation(job: PlannedJob, rows: RowCounts, speed: float, num_processes: int) -> float:
    """Returns the time of the evaluations during the training, and of the report at the end."""
    passes = _head_passes(job, backward=False)

    def measured(model: ModelSizes, num_tokens: float, num_targets: float) -> float:
        """Returns the time of one pass over evaluated rows."""
        return _forward(model, num_tokens, speed) + passes * _head(model, num_targets, speed)

    during = sum(
        (1 + rows.num_evals) * measured(sizes, rows.valid_tokens, rows.valid_targets)
        for sizes in job.students
    )
    untrained = job.students[-1]
    judged = [*job.students, untrained, *([job.teacher] if job.has_teacher else [])]
    if job.block.evaluation.ce_baseline:
        judged.append(untrained)
    seconds = during / num_processes
    for model in judged:
        seconds += measured(model, rows.valid_tokens, rows.valid_targets)
        seconds += measured(model, rows.test_tokens, rows.test_tokens / 2)
        seconds += model.num_bytes / LOAD_BYTES + _answers(job, rows, model, speed)
    return seconds


def _answers(job: PlannedJob, rows: RowCounts, model: ModelSizes, speed: float) -> float:
    evaluation = job.block.evaluation
    metrics = {*evaluation.metrics, *([evaluation.gate.metric] if evaluation.gate else [])}
    num_answers, new_tokens = job.evaluated_answers(rows)
    seconds = decode_seconds(model, num_answers, rows.prompt_tokens, new_tokens, speed)
    if "speed" in metrics:
        for num_sequences, num_tokens in TIMED:
            seconds += decode_seconds(model, num_sequences, rows.prompt_tokens, num_tokens, speed)
    return seconds


def _saving(job: PlannedJob, rows: RowCounts) -> float:
    seconds = SAVE_SECONDS
    is_lora = job.block.student.init == "lora"  # its checkpoints have adapters in place of weights
    for sizes, trained in zip(job.students, job.trained, strict=True):
        num_bytes = (4 * trained if is_lora else sizes.num_bytes) + 8 * trained
        seconds += max(1, rows.num_evals) * (num_bytes / WRITE_BYTES + CHECKPOINT_SECONDS)
        seconds += sizes.num_bytes / WRITE_BYTES * len(job.block.export)
    return seconds
