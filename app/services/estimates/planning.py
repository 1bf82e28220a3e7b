"""Describes a submitted job by numbers, from its checked plan."""

import subprocess
from typing import Literal

from app.contracts.planned_jobs import PlannedJob, RowCounts, has_expected_rows
from app.contracts.run_limits import MAX_VALIDATION_ROWS
from app.db.schema.tables import File
from app.errors import BadRequest
from app.services.estimates.model_files import stored_sizes
from app.services.estimates.row_counts import CountedFile, CountReply, CountRequest
from app.services.row_lengths import ESTIMATES, run_check
from app.services.submission import Plan, has_answers, readers_of
from app.services.training_rows import UNANSWERED

# Rows have at most about this number of bytes per token. English text has 4, escapes such as \u4e2d 6.
MOST_BYTES_PER_TOKEN = 8
ASSUMED_ANSWER_SHARE = 0.5  # of max_new_tokens, if the length of the teacher's answers is unknown


def planned_job(plan: Plan) -> PlannedJob:
    """Returns the numbers of the job."""
    spec = plan.spec
    is_same = spec.teacher.key == spec.start.key
    return PlannedJob(
        block=spec.distillation,
        has_teacher=spec.method != "supervised",
        teacher=stored_sizes(spec.teacher, plan.teacher),
        start=stored_sizes(spec.start, plan.start),
        has_expected_rows=has_expected_rows(spec.distillation, is_same_model=is_same),
    )


def least_counts(plan: Plan) -> RowCounts:
    """Returns the least counts that the files can have, from their sizes, without reading them.

    A part of the bytes may not be read: keys that are ignored, and answers that the teacher writes
    again. Each row is then taken for one token.
    """
    training = plan.training
    num_rows = training.num_rows or 1
    num_valid = min(max(1, num_rows // 10), MAX_VALIDATION_ROWS)
    is_answered = has_answers(plan, training)
    is_read = is_answered or training.format in UNANSWERED
    is_read = is_read and not (training.details or {}).get("ignored_keys")
    row_bytes = (training.max_row_bytes or 0) if is_read else 0
    longest = min(plan.max_tokens, max(1, row_bytes // MOST_BYTES_PER_TOKEN))
    tokens = max(num_rows, training.bytes // MOST_BYTES_PER_TOKEN if is_read else 0)
    return RowCounts(
        num_train=num_rows,
        num_valid=num_valid,
        train_tokens=tokens,
        train_targets=tokens // 2,
        valid_tokens=tokens * num_valid // num_rows,
        valid_targets=tokens * num_valid // num_rows // 2,
        teacher_tokens=tokens,
        num_unanswered=0 if is_answered else num_rows,
        prompt_tokens=tokens / num_rows,
        answer_tokens=1.0,
        longest_tokens=longest,
        num_steps=1,
        num_epochs=1.0,
        num_evals=1,
    )


def count_rows(
    plan: Plan, answer_tokens: float | None, device: Literal["cpu", "cuda"]
) -> CountReply:
    """Counts the rows of the job in a child process.

    `answer_tokens` is the known length of the teacher's answers, or None. `device` is where the job
    will be trained.

    Raises:
        BadRequest: A file is no longer in the store, or counting took too long.
        TooManyRequests: Too many checks are running.
    """
    data = plan.spec.distillation.data
    if answer_tokens is None:
        answer_tokens = max(1.0, ASSUMED_ANSWER_SHARE * data.max_new_tokens)
    teacher, *student = readers_of(plan)
    request = CountRequest(
        training=_counted(plan, plan.training),
        validation=_counted(plan, plan.validation) if plan.validation else None,
        test=_counted(plan, plan.test) if plan.test else None,
        readers=(*student, teacher),
        answer_tokens=min(answer_tokens, data.max_new_tokens),
        hyperparameters=plan.spec.distillation.hyperparameters,
        seed=plan.spec.seed,
        device=device,
    )
    try:
        project_id = plan.training.project_id
        reply = run_check("app.services.estimates.row_counts", request, project_id, ESTIMATES)
    except subprocess.TimeoutExpired as fault:
        message = "counting the tokens of the files took too long; use smaller files"
        raise BadRequest(message, "invalid_file", "training_file") from fault
    counted = CountReply.model_validate_json(reply)
    if counted.counts is None:
        code, param = counted.code, "training_file" if counted.code == "invalid_file" else "model"
        raise BadRequest(counted.fault, code, param)
    return counted


def _counted(plan: Plan, row: File) -> CountedFile:
    return CountedFile(
        store_key=row.store_key, num_bytes=row.bytes, is_answered=has_answers(plan, row)
    )
