"""Checks of a job request before its job is queued.

They find missing models and files, combinations that cannot work, and rows that are too long.
Memory and disk are checked by app.services.estimates.limits.
"""

import re
from dataclasses import dataclass, replace

from app.contracts.architectures import UNBOUNDED_CONTEXT
from app.contracts.distillation import Distillation, FreshConfig
from app.contracts.messages import SPLIT_VERSION, ArtifactRef, DistillationJob, ModelFacts
from app.db import files
from app.db.schema.tables import File
from app.db.session import Session
from app.errors import BadRequest, NotFound
from app.schemas.jobs import CreateJob
from app.services import job_defaults, model_registry
from app.services.files import TRAINING_PURPOSES
from app.services.fine_tuning import supervised
from app.services.fine_tuning.student_rules import BLOCK, Pair
from app.services.row_lengths import (
    NO_TEMPLATE,
    SUBMISSIONS,
    LengthCheck,
    Reader,
    RunningChecks,
    TemplateCheck,
    VocabularyCheck,
    ask,
)
from app.services.training_rows import ANSWERED_FORM, UNANSWERED

MODEL_ID_SUFFIX = 8  # characters of a job's id with which the id of its model ends
TEST_FILE = f"{BLOCK}.evaluation.test_file"
# Counts in the details of a file, and what the rows have.
TOOL_COUNTS = {"num_rows_with_tools": "tools", "num_rows_with_tool_calls": "tool calls"}


@dataclass(frozen=True)
class Plan:
    """The specification of a job whose models and files exist and fit each other.

    `max_tokens` is the longest sequence that the job can train on.
    """

    spec: DistillationJob
    teacher: ModelFacts
    start: ModelFacts
    training: File
    validation: File | None
    test: File | None
    max_tokens: int


def plan(session: Session, project_id: str, asked: CreateJob, *, job_id: str) -> Plan:
    """Resolves and locks the models and files of a request, and fills in the defaults.

    The id of the output model ends like `job_id`. Raises BadRequest or NotFound.
    """
    requested = asked.distillation
    teacher = requested and model_registry.resolve(
        session, project_id, requested.teacher, param=f"{BLOCK}.teacher", lock=True
    )
    start = model_registry.resolve(session, project_id, asked.model, lock=True)
    teacher = teacher or start
    if teacher.facts is None or start.facts is None:
        raise BadRequest(
            "a job can only start from models of jobs that have succeeded",
            "model_not_ready",
            "model",
        )
    training = training_file(session, project_id, asked.training_file, "training_file")
    validation = test = None
    if asked.validation_file is not None:
        validation = file_like(session, training, asked.validation_file, "validation_file")
    if requested is None:
        block = supervised.settle(asked, start.model_id, start.facts, training)
    else:
        if requested.evaluation.test_file is not None:
            test = file_like(session, training, requested.evaluation.test_file, TEST_FILE)
            refuse_known_rows(test, training, validation)
        pair = Pair(teacher.facts, start.facts, teacher.model_id == start.model_id, training.format)
        block = settle(requested.model_copy(update={"teacher": teacher.model_id}), asked, pair)
    spec = DistillationJob(
        method="supervised" if requested is None else "distillation",
        distillation=block,
        teacher=teacher.ref,
        start=start.ref,
        training_file=artifact(training),
        validation_file=artifact(validation) if validation else None,
        test_file=artifact(test) if test else None,
        split_version=SPLIT_VERSION,
        output_model=output_id(start.model_id, asked.suffix, job_id),
        seed=asked.seed or 0,
    )
    max_tokens = min(
        block.hyperparameters.max_sequence_tokens,
        teacher.facts.context_tokens,
        start.facts.context_tokens
        if (sizes := block.student.config) is None
        else context_of(sizes),
    )
    return Plan(spec, teacher.facts, start.facts, training, validation, test, max_tokens)


def training_file(session: Session, project_id: str, file_id: str, param: str) -> File:
    """Returns a file of training rows, locked against deletion. Raises BadRequest or NotFound."""
    row = files.find_file(session, project_id, file_id, lock=True)
    if row is None:
        raise NotFound(
            f"the file {file_id!r} does not exist; upload it with POST /v1/files", param=param
        )
    if row.purpose not in TRAINING_PURPOSES or row.format is None:
        raise BadRequest(
            f"the file {file_id!r} has the purpose {row.purpose}; upload it again with the purpose fine-tune",
            "invalid_file",
            param,
        )
    return row


def file_like(session: Session, training: File, file_id: str, param: str) -> File:
    """Returns another file whose rows have the same format. Raises BadRequest or NotFound.

    If the training file has no completions, the rows may have them.
    """
    row = training_file(session, training.project_id, file_id, param)
    if row.format not in (training.format, ANSWERED_FORM.get(training.format or "")):
        name = "validation" if param == "validation_file" else "test"
        raise BadRequest(
            f"the {name} file has the format {row.format}, but the training file has {training.format}; use one format",
            param=param,
        )
    return row


def refuse_known_rows(test: File, training: File, validation: File | None) -> None:
    """Raises BadRequest if the test file has the content of the training or validation file."""
    for row, name in ((training, "training"), (validation, "validation")):
        if row is not None and row.sha256 == test.sha256:
            raise BadRequest(
                f"the test file has the same content as the {name} file; use rows that are not used for training",
                param=TEST_FILE,
            )


def settle(block: Distillation, asked: CreateJob, pair: Pair) -> Distillation:
    """Returns the block with its open fields filled in from the request. Raises BadRequest."""
    hyperparameters = supervised.with_openai_hyperparameters(block.hyperparameters, asked)
    return job_defaults.settle(block.model_copy(update={"hyperparameters": hyperparameters}), pair)


def context_of(sizes: FreshConfig) -> int:
    """Returns the context of a fresh student, in tokens."""
    return UNBOUNDED_CONTEXT if sizes.family in ("bloom", "t5") else sizes.max_positions


def output_id(start_id: str, suffix: str | None, job_id: str) -> str:
    """Returns the id of the student's model, `ds:{name}:{suffix}:{end of the job's id}`.

    `name` is the id of the model that the student starts from. If that is itself a student
    (`ds:…`), its name is taken over.
    """
    name = re.sub(r":ckpt-step-\d+$", "", start_id)
    name = name.split(":")[1] if name.startswith("ds:") else name
    return f"ds:{name}:{supervised.normalised_suffix(suffix)}:{job_id[-MODEL_ID_SUFFIX:]}"


def artifact(row: File) -> ArtifactRef:
    """Returns the reference to a file's bytes in the store."""
    return ArtifactRef(key=row.store_key, bytes=row.bytes, sha256=row.sha256)


def inspect(plan: Plan, running: RunningChecks = SUBMISSIONS) -> None:
    """Runs the checks that read the store: vocabulary size, chat template and row lengths.

    `running` limits how many of them run at the same time. They take seconds, so call this outside
    a transaction. Raises BadRequest or TooManyRequests.
    """
    check_vocabulary(plan, running)
    check_template(plan, running)
    check_lengths(plan, plan.training, "training_file", running)
    if plan.validation is not None:
        check_lengths(plan, plan.validation, "validation_file", running)
    if plan.test is not None:
        check_lengths(plan, plan.test, TEST_FILE, running)


def check_vocabulary(plan: Plan, running: RunningChecks) -> None:
    """Raises BadRequest if a fresh student's vocabulary is smaller than the teacher's tokenizer."""
    sizes = plan.spec.distillation.student.config
    if sizes is None or sizes.vocab_size is None:
        return
    param = f"{BLOCK}.student.config.vocab_size"
    question = VocabularyCheck(model_key=plan.spec.teacher.key)
    checked = ask(question, plan.training.project_id, param=param, running=running)
    num_ids = checked.num_tokens or 0
    if sizes.vocab_size < num_ids:
        raise BadRequest(
            f"vocab_size is {sizes.vocab_size}, but the teacher's tokenizer has {num_ids} token ids; leave it out, or set "
            "it to at least that number",
            param=param,
        )


def check_template(plan: Plan, running: RunningChecks) -> None:
    """Raises BadRequest if the rows have tools that the chat template of a model leaves out."""
    used = {
        "training_file": plan.training.details,
        "validation_file": plan.validation.details if plan.validation else None,
        TEST_FILE: plan.test.details if plan.test else None,
    }
    needs = {
        param: {name for name in TOOL_COUNTS if details.get(name)}
        for param, details in used.items()
        if details is not None
    }
    if not any(needs.values()):
        return
    for key in dict.fromkeys((plan.spec.teacher.key, plan.spec.start.key)):
        question = TemplateCheck(template_of=key)
        support = ask(question, plan.training.project_id, running=running)
        rendered = {"num_rows_with_tools": support.has_tools}
        rendered["num_rows_with_tool_calls"] = support.has_tool_calls
        for param, names in needs.items():
            missing = [
                what for name, what in TOOL_COUNTS.items() if name in names and not rendered[name]
            ]
            if missing:
                raise BadRequest(
                    f"the rows have {missing[0]}, but the chat template of the model leaves them out; use a model whose "
                    "template supports tools, or upload rows without tools",
                    "tools_unsupported",
                    param,
                )


def check_lengths(plan: Plan, row: File, param: str, running: RunningChecks) -> None:
    """Raises BadRequest if a row of the file, with its chat template, has more than `max_tokens`.

    A token has at least one byte, so a row with at most as many bytes as free tokens is known to
    fit. Of the other rows, a limited number is tokenised, the longest first.
    """
    readers = readers_of(plan)
    added = max(max(0, reader.cost.first) + max(0, reader.cost.system) for reader in readers)
    over_bytes = plan.max_tokens - added
    if (row.max_row_bytes or 0) <= over_bytes:
        return
    question = LengthCheck(
        store_key=row.store_key,
        over_bytes=over_bytes,
        max_tokens=plan.max_tokens,
        is_answered=has_answers(plan, row),
        readers=readers,
    )
    answer = ask(question, row.project_id, param=param, running=running)
    if answer.is_lost:
        message = f"the content of the file {row.id!r} is no longer in the store; upload it again"
        raise BadRequest(message, "invalid_file", param)
    if answer.line is None:
        return
    if answer.num_tokens is None:
        message = (
            f"line {answer.line} cannot be tokenised by the tokenizer of a model; change the line"
        )
        raise BadRequest(message, "invalid_file", param)
    raise BadRequest(
        f"line {answer.line} has {answer.num_tokens:,} tokens, including the chat template and the end token, but at most "
        f"{plan.max_tokens:,} are allowed (max_sequence_tokens and the models' context); shorten it or raise "
        "max_sequence_tokens",
        "context_length_exceeded",
        param,
    )


def readers_of(plan: Plan) -> tuple[Reader, ...]:
    """Returns the readers of the rows: the teacher, and the student if it reads them differently.

    A fresh student has the teacher's tokenizer.
    """
    student = plan.spec.distillation.student
    teacher = Reader(
        plan.spec.teacher.key, plan.teacher.family, plan.teacher.chat_cost or NO_TEMPLATE
    )
    family = job_defaults.outline_of(student, plan.start).family
    if plan.teacher.tokenizer_sha256 == plan.start.tokenizer_sha256:
        reader = replace(teacher, family=family)
        return (teacher,) if reader == teacher else (teacher, reader)
    return teacher, Reader(plan.spec.start.key, family, plan.start.chat_cost or NO_TEMPLATE)


def has_answers(plan: Plan, row: File) -> bool:
    """Returns whether the job uses the answers in the rows, rather than the teacher's.

    If the teacher answers the training rows because they have no completions, held-out rows and test
    rows keep theirs.
    """
    writes_again = plan.spec.distillation.data.completions == "teacher"
    writes_again = writes_again and plan.training.format not in UNANSWERED
    return row.format not in UNANSWERED and not writes_again
