"""Rules of supervised jobs, and OpenAI's hyperparameters for jobs of all methods."""

import re
import unicodedata
from typing import NoReturn, TypeVar

from app.contracts.distillation import (
    Auto,
    Data,
    Distillation,
    Evaluation,
    Hyperparameters,
    Objective,
    Student,
)
from app.contracts.messages import ModelFacts
from app.db.schema.tables import File
from app.errors import BadRequest
from app.schemas.jobs import CreateJob, OpenAIHyperparameters, OtherMethod
from app.services.trackers.integrations import refuse_unconfigured
from app.services.training_rows import CONVERSATIONS, UNANSWERED
from app.settings import get_settings

NumberT = TypeVar("NumberT", int, float)
# Longest rows of a supervised job, whose owner cannot set `max_sequence_tokens`.
MAX_SEQUENCE_TOKENS = 16_384
INNER = "method.supervised.hyperparameters"
INSTEAD = {
    "dpo": 'use {"type": "supervised"} with the preferred answers as the answers of the rows, or '
    '{"type": "distillation"} with a teacher',
    "reinforcement": 'use {"type": "distillation"} with a teacher and, for training on the '
    'student\'s own answers, "data": {"completions": "student"}',
}


def refuse_unsupported(asked: CreateJob) -> None:
    """Raises BadRequest for methods that are not supported and trackers that are not configured."""
    if isinstance(asked.method, OtherMethod):
        name = asked.method.type
        raise BadRequest(
            f"the method {name} is not supported; {INSTEAD[name]}", param="method.type"
        )
    refuse_unconfigured(asked.integrations or [], get_settings())


def settle(asked: CreateJob, model_id: str, start: ModelFacts, training: File) -> Distillation:
    """Returns the options of a supervised job in terms of a distillation without a teacher.

    Raises BadRequest if the model or the rows cannot be used.
    """
    if start.family == "masked":
        refuse(
            f"a {start.architecture} model does not generate text and cannot be fine-tuned; choose a causal or "
            "encoder-decoder model",
            "model",
        )
    if training.format in UNANSWERED:
        refuse(
            "the rows have no answers to learn from; end each conversation with an assistant message, or give "
            'each prompt a completion; to learn from a teacher\'s answers, use {"type": "distillation"}',
            "training_file",
        )
    if training.format in CONVERSATIONS and not start.has_chat_template:
        refuse(
            "the rows are chats, but the model has no chat template; upload rows with prompt and completion",
            "training_file",
        )
    requested = merged(asked)
    n_epochs = requested.n_epochs
    if n_epochs == "auto":
        n_epochs = automatic_epochs(training.num_rows or 1)
    hyperparameters = Hyperparameters(
        n_epochs=n_epochs,
        batch_rows=number(requested.batch_size),
        learning_rate_multiplier=number(requested.learning_rate_multiplier),
        max_sequence_tokens=max(8, min(start.context_tokens, MAX_SEQUENCE_TOKENS)),
    )
    lora = asked.supervised.lora
    return Distillation(
        teacher=model_id,
        student=Student(
            init="checkpoint" if lora is None else "lora",
            lora=lora,
            freeze_head=False,
            freeze_encoder=False,
        ),
        data=Data(completions="dataset"),
        objective=Objective(teacher_signal="text", ce_weight=1.0),
        hyperparameters=hyperparameters,
        evaluation=Evaluation(metrics=("perplexity",)),
    )


def refuse(message: str, param: str) -> NoReturn:
    """Raises BadRequest for a parameter of the request."""
    raise BadRequest(message, param=param)


def automatic_epochs(num_rows: int) -> int:
    """Returns the number of epochs that OpenAI chooses for a file of this size.

    Source: Chat_finetuning_data_prep.ipynb of the OpenAI Cookbook.
    """
    if 3 * num_rows < 100:
        return min(25, 100 // num_rows)
    if 3 * num_rows > 25_000:
        return max(1, 25_000 // num_rows)
    return 3


def merged(asked: CreateJob) -> OpenAIHyperparameters:
    """Returns OpenAI's hyperparameters from both places where a request may have them.

    Raises BadRequest if both have a number for the same one, and the numbers differ.
    """
    outer = asked.hyperparameters or OpenAIHyperparameters()
    inner = asked.supervised.hyperparameters or OpenAIHyperparameters()
    chosen = {}
    for name in OpenAIHyperparameters.model_fields:
        values = [v for v in (getattr(inner, name), getattr(outer, name)) if v != "auto"]
        if len(set(values)) > 1:
            refuse_conflict(name, INNER)
        chosen[name] = values[0] if values else "auto"
    return OpenAIHyperparameters.model_validate(chosen)


def with_openai_hyperparameters(own: Hyperparameters, asked: CreateJob) -> Hyperparameters:
    """Returns the hyperparameters of a distillation, with those in OpenAI's top-level field.

    Raises BadRequest if both have a value for the same one, and the values differ.
    """
    outer = asked.hyperparameters or OpenAIHyperparameters()
    names = {
        "n_epochs": "n_epochs",
        "batch_rows": "batch_size",
        "learning_rate_multiplier": "learning_rate_multiplier",
    }
    changes = {}
    for ours, theirs in names.items():
        value = getattr(outer, theirs)
        if value == "auto":
            continue
        if ours in own.model_fields_set and getattr(own, ours) not in (None, value):
            refuse_conflict(theirs, "method.distillation.hyperparameters")
        changes[ours] = value
    if "learning_rate_multiplier" in changes and own.learning_rate != "auto":
        raise BadRequest(
            "learning_rate_multiplier is a factor of the automatic learning rate, but "
            "method.distillation.hyperparameters has a learning_rate; give one of them",
            param="hyperparameters.learning_rate_multiplier",
        )
    return own.model_copy(update=changes)


def refuse_conflict(name: str, other: str) -> NoReturn:
    """Raises BadRequest for a hyperparameter with two values."""
    raise BadRequest(
        f"{name} is given twice, with different values: in hyperparameters and in {other}; give one of them",
        param=f"hyperparameters.{name}",
    )


def number(value: NumberT | Auto) -> NumberT | None:
    """Returns the number, or None for "auto"."""
    return None if isinstance(value, str) else value


def normalised_suffix(suffix: str | None) -> str:
    """Returns the suffix as a part of a model's name: a-z, 0-9 and "-", perhaps empty.

    Accents are removed, and other characters become "-".
    """
    folded = unicodedata.normalize("NFKD", (suffix or "").casefold())
    plain = folded.encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:64].strip("-")
