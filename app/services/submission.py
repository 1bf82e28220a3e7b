"""What can be refused before a job is queued: missing things, things that do not fit, too little disk."""

import heapq
import re
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import Tokenizer

from app.contracts import ArtifactRef, ChatCost, DistillationJob, ModelFacts
from app.db import files
from app.db.session import Session
from app.db.tables import File
from app.distillation import Distillation
from app.errors import BadRequest, NotFound
from app.schemas.jobs import CreateJob
from app.services import registry
from app.services.files import TRAINING_PURPOSES
from app.services.rows import UNANSWERED, Row, parse_row
from app.settings import Settings
from app.storage import store

STUDENT_COPIES = (
    6  # weights, two Adam moments and three checkpoints' worth of them, in units of the start's weights
)
MAX_ROWS_COUNTED = 256  # the longest rows of a file, which are tokenised to see whether they fit
MAX_BYTES_COUNTED = 16 * 2**20
BLOCK = "method.distillation"
NO_TEMPLATE = ChatCost(first=0, end=1, user=0, assistant=0, system=0)


@dataclass(frozen=True)
class Plan:
    """A job whose parts exist and fit each other."""

    spec: DistillationJob
    teacher: ModelFacts
    start: ModelFacts
    training: File
    validation: File | None
    max_tokens: int


def plan(session: Session, project_id: str, asked: CreateJob, *, short: str) -> Plan:
    """Resolves what the request names; raises BadRequest or NotFound that says what does not fit."""
    block = asked.method.distillation
    teacher = registry.resolve(session, project_id, block.teacher, param=f"{BLOCK}.teacher")
    start = registry.resolve(session, project_id, asked.model)
    if teacher.facts is None or start.facts is None:
        raise BadRequest(
            "a job can only begin from models of jobs that have succeeded", "model_not_ready", "model"
        )
    if teacher.facts.tokenizer_sha256 != start.facts.tokenizer_sha256:
        raise BadRequest(
            f"{asked.model!r} and the teacher {block.teacher!r} have different tokenizers; pick a pair that shares one",
            "tokenizer_mismatch",
            "model",
        )
    training = training_file(session, project_id, asked.training_file, "training_file")
    validation = None
    if asked.validation_file is not None:
        validation = training_file(session, project_id, asked.validation_file, "validation_file")
        if validation.format != training.format:
            raise BadRequest(
                f"the validation file has the format {validation.format}, the training file {training.format}",
                param="validation_file",
            )
    block = settle(
        block.model_copy(update={"teacher": teacher.model_id}), asked, start.model_id, training.format
    )
    check_layers(block, start.facts)
    spec = DistillationJob(
        distillation=block,
        teacher=teacher.ref,
        start=start.ref,
        training_file=artifact(training),
        validation_file=artifact(validation) if validation else None,
        output_model=output_id(start.model_id, asked.suffix, short),
        seed=asked.seed or 0,
    )
    max_tokens = min(
        block.hyperparameters.max_sequence_tokens, teacher.facts.context_tokens, start.facts.context_tokens
    )
    return Plan(spec, teacher.facts, start.facts, training, validation, max_tokens)


def training_file(session: Session, project_id: str, file_id: str, param: str) -> File:
    row = files.find_file(session, project_id, file_id, lock=True)
    if row is None:
        raise NotFound(f"the file {file_id!r} does not exist; upload it with POST /v1/files", param=param)
    if row.purpose not in TRAINING_PURPOSES or row.format is None:
        raise BadRequest(
            f"the file {file_id!r} has the purpose {row.purpose}; upload it again as fine-tune",
            "invalid_file",
            param,
        )
    return row


def settle(block: Distillation, asked: CreateJob, start_id: str, row_format: str | None) -> Distillation:
    """The block with what was left open decided by what the request names."""
    student, data, hyperparameters = block.student, block.data, block.hyperparameters
    if "init" not in student.model_fields_set:
        chooses_layers = student.num_layers is not None or student.layers is not None
        is_same = start_id == block.teacher
        student = student.model_copy(update={"init": "layers" if is_same or chooses_layers else "checkpoint"})
    if student.init == "checkpoint" and "freeze_head" not in student.model_fields_set:
        student = student.model_copy(update={"freeze_head": False})  # its head is not a copy of the teacher's
    if data.completions is None:
        data = data.model_copy(update={"completions": "teacher" if row_format in UNANSWERED else "dataset"})
    elif data.completions == "dataset" and row_format in UNANSWERED:
        raise BadRequest(
            "the file has no completions; leave data.completions out, or upload rows that have them",
            param=f"{BLOCK}.data.completions",
        )
    elif data.completions == "teacher" and row_format == "text":
        raise BadRequest(
            "plain text has no prompts for the teacher to answer; upload rows with a prompt",
            param=f"{BLOCK}.data.completions",
        )
    outer = asked.hyperparameters.n_epochs if asked.hyperparameters else "auto"
    if outer != "auto":
        if "n_epochs" in hyperparameters.model_fields_set and hyperparameters.n_epochs != outer:
            raise BadRequest(
                "n_epochs is given twice, with different values", param="hyperparameters.n_epochs"
            )
        hyperparameters = hyperparameters.model_copy(update={"n_epochs": outer})
    return block.model_copy(update={"student": student, "data": data, "hyperparameters": hyperparameters})


def check_layers(block: Distillation, start: ModelFacts) -> None:
    student = block.student
    wanted = student.num_layers or len(student.layers or ())
    highest = max(student.layers or (0,))
    name = "layers" if student.layers is not None else "num_layers"
    if wanted > start.num_layers or highest >= start.num_layers:
        raise BadRequest(
            f"the student asks for {wanted} layers up to number {highest}, but the model has {start.num_layers} "
            f"(numbered from 0)"
            if student.layers is not None
            else f"the student asks for {wanted} layers, but the model has {start.num_layers}",
            param=f"{BLOCK}.student.{name}",
        )


def output_id(start_id: str, suffix: str | None, short: str) -> str:
    """`ds:{student}:{suffix}:{short}`; a student of a student keeps the name of the first."""
    name = re.sub(r":ckpt-step-\d+$", "", start_id)
    name = name.split(":")[1] if name.startswith("ds:") else name
    return f"ds:{name}:{suffix or ''}:{short}"


def artifact(row: File) -> ArtifactRef:
    return ArtifactRef(key=row.store_key, bytes=row.bytes, sha256=row.sha256)


def inspect(plan: Plan, settings: Settings) -> None:
    """The checks that read the store: room on the disk, and rows that are too long."""
    check_disk(plan.start, settings)
    check_lengths(plan, plan.training, "training_file")
    if plan.validation is not None:
        check_lengths(plan, plan.validation, "validation_file")


def check_disk(start: ModelFacts, settings: Settings) -> None:
    free = store().free_bytes()
    needed = start.weights_bytes * STUDENT_COPIES + settings.min_free_bytes
    if free is not None and free < needed:
        raise BadRequest(
            f"not enough disk: the job needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; "
            f"delete files or models, or pick a smaller student",
            "insufficient_storage",
        )


def check_lengths(plan: Plan, row: File, param: str) -> None:
    """Refuses a file with rows that overflow the sequence, what the chat template adds included.

    A token is at least one byte, so only rows with more bytes than tokens fit are tokenised: the longest
    first, and a bounded number of them.
    """
    cost = plan.teacher.chat_cost or NO_TEMPLATE
    over_bytes = plan.max_tokens - max(0, cost.first) - max(0, cost.system)
    if (row.max_row_bytes or 0) <= over_bytes:
        return
    tokenizer = load_tokenizer(plan.spec.teacher.key)
    num_bytes = 0
    for size, line_number, line in longest_rows(row.store_key, over_bytes=over_bytes):
        num_bytes += size
        if num_bytes > MAX_BYTES_COUNTED:
            return
        num_tokens = count_tokens(plan, parse_row(line), tokenizer)
        if num_tokens > plan.max_tokens:
            raise BadRequest(
                f"line {line_number} has {num_tokens:,} tokens, chat template and end included, more than the "
                f"{plan.max_tokens:,} that fit (max_sequence_tokens and the models' context); shorten it or raise "
                "max_sequence_tokens",
                "context_length_exceeded",
                param,
            )


def count_tokens(plan: Plan, row: Row, tokenizer: Tokenizer) -> int:
    """Tokens of the sequence that the run makes of a row; an answer still to come counts as one."""
    is_answered = plan.spec.distillation.data.completions != "teacher"
    cost = plan.teacher.chat_cost or NO_TEMPLATE
    if "messages" in row:
        messages = (
            row["messages"][:-1] if not is_answered and plan.training.format == "chat" else row["messages"]
        )
        contents = [str(message["content"]) for message in messages]
        roles = [message["role"] for message in messages]
        num_assistant = roles.count("assistant") - is_answered
        num_system = roles.count("system")
        num_further = len(roles) - num_system - roles.count("assistant") - 1
        added = cost.first + cost.user * num_further + cost.assistant * num_assistant
        added += cost.system if num_system else 0
    else:
        contents = [str(text) for text in row.values()] if is_answered else [row["prompt"]]
        added = 0 if "text" in row else cost.first
    added += cost.end if is_answered and "text" not in row else 1
    return added + sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in contents)


def longest_rows(store_key: str, *, over_bytes: int) -> list[tuple[int, int, bytes]]:
    """(bytes, line number, line) of the longest lines over a size, longest first."""
    with store().open(store_key) as file:
        sizes = ((len(line), number) for number, line in enumerate(file, 1) if len(line) > over_bytes)
        wanted = {number: size for size, number in heapq.nlargest(MAX_ROWS_COUNTED, sizes)}
    with store().open(store_key) as file:
        found = [(wanted[number], number, line) for number, line in enumerate(file, 1) if number in wanted]
    return sorted(found, reverse=True)


@lru_cache(maxsize=8)
def load_tokenizer(model_key: str) -> Tokenizer:
    with store().open(f"{model_key}/tokenizer.json") as file:
        return Tokenizer.from_buffer(file.read())
