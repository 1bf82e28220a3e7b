"""Checks options of a distillation about its models: `student` and `teacher_precision`."""

from dataclasses import dataclass
from typing import NoReturn

from app.contracts.architectures import ARCHITECTURES
from app.contracts.distillation import Distillation, FreshConfig, Student
from app.contracts.memory.teacher_weights import QUANTIZED_MULTIPLES
from app.contracts.messages import ModelFacts
from app.errors import BadRequest

BLOCK = "method.distillation"
# Architectures whose width can be reduced.
NARROWABLE = tuple(a.model_type for a in ARCHITECTURES.values() if a.layers is not None)


@dataclass(frozen=True)
class Pair:
    """A teacher, the model that the student starts from, and the format of the training rows."""

    teacher: ModelFacts
    start: ModelFacts
    is_same: bool  # the student starts from the teacher
    row_format: str | None

    @property
    def has_one_tokenizer(self) -> bool:
        return self.teacher.tokenizer_sha256 == self.start.tokenizer_sha256


def refuse(message: str, param: str, code: str = "invalid_value") -> NoReturn:
    """Raises BadRequest for a field of the block, or for `model` or `training_file` outside it."""
    raise BadRequest(
        message, code, param if param in ("model", "training_file") else f"{BLOCK}.{param}"
    )


def check_start(student: Student, pair: Pair) -> None:
    """Raises BadRequest if the student cannot be made from the model that it starts from."""
    start = pair.start
    if student.config is not None:
        if student.vocabulary == "rows" and student.config.has_encoder:
            refuse(
                f"the vocabulary of a fresh {student.config.family} model cannot be trimmed, only that of a causal "
                "model; leave student.vocabulary out",
                "student.vocabulary",
            )
        check_sizes(student.config)
        if not pair.has_one_tokenizer or (start.family == "masked" and not pair.is_same):
            refuse(
                "a fresh student only uses the teacher's tokenizer; set model to the teacher, too",
                "model",
                "tokenizer_mismatch",
            )
        return
    if start.family == "masked":
        refuse(
            f"a {start.architecture} model does not generate text, so a student cannot start from it; use student.init = "
            "fresh with student.config (the closest family is encoder-decoder), or start from a causal or encoder-decoder model",
            "model",
        )
    if student.init == "width" and start.architecture not in NARROWABLE:
        refuse(
            f"the width of a {start.architecture} model cannot be pruned (only that of {', '.join(NARROWABLE)} can); use "
            "student.init = layers, or fresh with the sizes in student.config",
            "student.init",
        )
    if student.vocabulary == "rows" and start.family != "causal":
        refuse(
            f"the vocabulary of a {start.architecture} model cannot be trimmed, only that of a causal model; leave "
            "student.vocabulary out",
            "student.vocabulary",
        )
    if (student.hidden_size or 0) > start.hidden_size:
        refuse(
            f"the hidden_size of the model is {start.hidden_size}; init = width can only reduce it",
            "student.hidden_size",
        )
    for name in ("num_encoder_layers", "num_decoder_layers"):
        if start.family != "seq2seq" and getattr(student, name) is not None:
            refuse(
                f"a {start.architecture} model has no separate encoder and decoder layers; give num_layers",
                f"student.{name}",
            )


def check_sizes(sizes: FreshConfig) -> None:
    """Raises BadRequest if the architecture of a fresh student does not support its sizes."""
    head_size = sizes.hidden_size // sizes.num_heads
    if sizes.family == "llama" and head_size % 2:
        refuse(
            f"rotary position embeddings need an even head size, not {head_size}; change hidden_size or num_heads",
            "student.config.num_heads",
        )
    if sizes.family == "bloom" and sizes.intermediate_size not in (None, 4 * sizes.hidden_size):
        refuse(
            "bloom's intermediate size is always 4 x hidden_size; leave it out",
            "student.config.intermediate_size",
        )
    if not sizes.has_encoder and (sizes.num_encoder_layers or sizes.num_decoder_layers):
        refuse(f"{sizes.family} has no encoder; give num_layers only", "student.config.num_layers")


def check_layers(student: Student, start: ModelFacts) -> None:
    """Raises BadRequest if `start` has too few layers, or if layer counts contradict each other."""
    asked = student.num_layers if isinstance(student.num_layers, tuple) else (student.num_layers,)
    wanted = {
        "num_layers": (max(n or 0 for n in asked), start.num_layers),
        "num_encoder_layers": (student.num_encoder_layers or 0, start.num_encoder_layers or 0),
        "num_decoder_layers": (student.num_decoder_layers or 0, start.num_layers),
        "layers": (1 + max(student.layers or (-1,)), start.num_layers),
    }
    for name, (number, available) in wanted.items():
        if number > available:
            what = (
                f"layer {number - 1}, counted from 0," if name == "layers" else f"{number} layers"
            )
            refuse(f"the student asks for {what} but the model has {available}", f"student.{name}")
    ways = {
        student.num_layers,
        student.num_decoder_layers,
        len(student.layers) if student.layers else None,
    }
    if len(ways - {None}) > 1:
        refuse(
            "num_layers, num_decoder_layers and layers all set the decoder's layers; give one of them",
            "student.num_decoder_layers",
        )


def check_precision(block: Distillation, teacher: ModelFacts) -> None:
    """Raises BadRequest if the layers of the teacher cannot be quantised as the job asks."""
    if block.teacher_precision == "auto":
        return
    known = ARCHITECTURES.get(teacher.architecture)
    if known is not None and not known.is_quantizable:
        refuse(
            f"a {teacher.architecture} teacher cannot be quantised, because its layers are not nn.Linear; leave "
            "teacher_precision out",
            "teacher_precision",
        )
    multiple = QUANTIZED_MULTIPLES[block.teacher_precision]
    if teacher.hidden_size % multiple:
        refuse(
            f"{block.teacher_precision} needs layers whose widths are multiples of {multiple}, and the hidden size of the "
            f"teacher is {teacher.hidden_size}; use int8, or leave teacher_precision out",
            "teacher_precision",
        )
