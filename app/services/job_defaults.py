"""Fills in and checks the block `method.distillation` of a job, given its models and rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from app.contracts.architectures import ARCHITECTURES
from app.contracts.distillation import (
    Data,
    Distillation,
    HiddenTerm,
    Objective,
    Student,
    TeacherSignal,
)
from app.contracts.messages import ModelFacts, ModelKind
from app.services.fine_tuning.student_rules import (
    Pair,
    check_layers,
    check_precision,
    check_start,
    refuse,
)
from app.services.training_rows import CONVERSATIONS, UNANSWERED

# Architectures that can be exported to GGUF.
EXPORTABLE = tuple(a.model_type for a in ARCHITECTURES.values() if a.gguf is not None)
SIGNAL = "objective.teacher_signal"


@dataclass(frozen=True)
class Outline:
    """Properties of a student that are known before it is built; for a ladder, of the smallest."""

    architecture: str
    family: ModelKind
    num_layers: int
    num_encoder_layers: int | None


def settle(block: Distillation, pair: Pair) -> Distillation:
    """Returns the block with its open fields filled in. Raises BadRequest if it cannot work."""
    student = settle_student(block.student, pair)
    check_start(student, pair)
    check_layers(student, pair.start)
    check_precision(block, pair.teacher)
    outline = outline_of(student, pair.start)
    objective = settle_objective(block.objective, pair, outline)
    data = settle_data(block, objective, pair)
    block = block.model_copy(update={"student": student, "data": data, "objective": objective})
    check_terms(objective, pair, outline)
    check_evaluation(block, pair)
    if block.export and outline.architecture not in EXPORTABLE:
        refuse(
            f"a {outline.architecture} student cannot be exported as GGUF (only {', '.join(EXPORTABLE)} can); "
            "leave export out: safetensors are always written",
            "export",
        )
    return block


def settle_student(student: Student, pair: Pair) -> Student:
    """Returns the student's block with `init`, `freeze_head` and `freeze_encoder` filled in."""
    said, decided = student.model_fields_set, dict[str, Any]()  # Any: fields of several types
    init = student.init
    if "init" not in said:
        numbers = (
            student.num_layers,
            student.layers,
            student.num_encoder_layers,
            student.num_decoder_layers,
        )
        chooses_layers = any(number is not None for number in numbers)
        chooses_layers |= student.fit_rows not in ("auto", 0) or student.layer_choice != "auto"
        init = decided["init"] = "layers" if pair.is_same or chooses_layers else "checkpoint"
    if "freeze_head" not in said and init in ("checkpoint", "fresh", "lora"):
        decided["freeze_head"] = False  # its head is not a copy of the teacher's
    has_whole_encoder = student.num_encoder_layers in (None, pair.start.num_encoder_layers)
    if "freeze_encoder" not in said:
        decided["freeze_encoder"] = (
            init == "layers" and pair.start.family == "seq2seq" and has_whole_encoder
        )
    return student.model_copy(update=decided)


def outline_of(student: Student, start: ModelFacts) -> Outline:
    """Returns the outline of the student that the job will build."""
    if (sizes := student.config) is not None:
        num_layers = sizes.num_decoder_layers or sizes.num_layers
        if not sizes.has_encoder:
            return Outline(sizes.family, "causal", num_layers, None)
        return Outline(
            sizes.family, "seq2seq", num_layers, sizes.num_encoder_layers or sizes.num_layers
        )
    smallest = student.ladder[0] if student.ladder else student.num_layers
    number = len(student.layers) if student.layers else smallest or student.num_decoder_layers
    default = max(1, start.num_layers // 2) if student.init == "layers" else start.num_layers
    num_layers = number if isinstance(number, int) else default
    num_encoder_layers = student.num_encoder_layers or start.num_encoder_layers
    return Outline(start.architecture, start.family, num_layers, num_encoder_layers)


def settle_objective(objective: Objective, pair: Pair, outline: Outline) -> Objective:
    """Returns the objective with the signal filled in, and what the signal requires."""
    signal = settle_signal(objective.teacher_signal, pair, outline)
    if objective.adaptation_steps not in ("auto", 0) and pair.teacher.family != "masked":
        refuse(
            "adaptation_steps needs a masked teacher (bert, roberta); leave it out",
            "objective.adaptation_steps",
        )
    decided: dict[str, Any] = {"teacher_signal": signal}  # Any: fields of several types
    if signal == "text":
        decided["ce_weight"] = 1.0
    if signal == "hidden" and objective.hidden is None and objective.attention is None:
        decided["hidden"] = HiddenTerm()
    return objective.model_copy(update=decided)


def settle_signal(asked: str, pair: Pair, outline: Outline) -> TeacherSignal:
    """Returns the signal that the pair uses. Raises BadRequest if it cannot use the one given."""
    teacher = pair.teacher
    if teacher.family == "masked":
        if asked in ("logits", "uld", "text"):
            refuse(
                f"{teacher.architecture} has no next-token distribution; use objective.teacher_signal = conditional_mlm "
                "or hidden",
                SIGNAL,
            )
        if not pair.has_one_tokenizer:
            refuse(
                f"a {teacher.architecture} teacher needs a student with the same tokenizer; use one that has it, "
                "such as a student with student.init = fresh",
                "model",
                "tokenizer_mismatch",
            )
        return "hidden" if asked == "hidden" else "conditional_mlm"
    if asked == "conditional_mlm":
        refuse(
            f"conditional_mlm needs a masked teacher (bert, roberta), and {teacher.architecture} is not one; use logits",
            SIGNAL,
        )
    if pair.has_one_tokenizer:
        return "logits" if asked == "auto" else asked  # type: ignore[return-value] # all others are signals
    if asked in ("logits", "hidden"):
        refuse(
            f"student and teacher have different tokenizers, so {asked} cannot be compared token by token; use "
            "objective.teacher_signal = uld or text, or a pair that shares a tokenizer",
            SIGNAL,
            "tokenizer_mismatch",
        )
    if asked == "auto":
        return "uld" if teacher.family == outline.family else "text"
    return asked  # type: ignore[return-value] # uld or text


def settle_data(block: Distillation, objective: Objective, pair: Pair) -> Data:
    """Returns the data block with `completions` filled in. Raises BadRequest if it cannot work."""
    data, row_format, teacher = block.data, pair.row_format, pair.teacher
    where, is_unanswered = "data.completions", row_format in UNANSWERED
    learns_text = objective.teacher_signal == "text" and data.completions is None
    if teacher.family == "masked" and (is_unanswered or data.completions == "teacher"):
        refuse(
            f"{teacher.architecture} does not generate text, so it cannot answer prompts; upload rows that have completions and "
            "use data.completions = dataset",
            where if data.completions is not None else "training_file",
        )
    if row_format in CONVERSATIONS and not (
        teacher.has_chat_template and pair.start.has_chat_template
    ):
        refuse(
            "the rows are chats, but a model of the pair has no chat template; upload rows with prompt and completion",
            "training_file",
        )
    if data.completions == "dataset" and is_unanswered:
        refuse(
            "the file has no completions; leave data.completions out, or upload rows that have them",
            where,
        )
    sources = {where: data.completions}
    if (then := objective.then) is not None:
        sources["objective.then.completions"] = then.completions
    for param, source in sources.items():
        if source in ("student", "replay") and objective.teacher_signal != "logits":
            refuse(
                f"completions from {source} need the teacher signal logits, but this pair uses "
                f"{objective.teacher_signal}; take completions from dataset or teacher",
                param,
            )
        if source in ("student", "replay") and block.hyperparameters.num_devices > 1:
            refuse(
                f"completions from {source} are trained by one process; leave num_devices out",
                "hyperparameters.num_devices",
            )
    if row_format == "text":
        for param, source in sources.items():
            if source not in (None, "dataset"):
                refuse(
                    f"plain text has no prompts for the {'student' if source == 'replay' else source} to answer; upload "
                    "rows with a prompt",
                    param,
                )
        if learns_text:
            refuse(
                "plain text has no prompts for the teacher to answer, and this pair can only learn from the "
                "teacher's answers; upload rows with a prompt",
                "training_file",
            )
    if data.completions is None:
        source = "teacher" if is_unanswered or learns_text else "dataset"
        data = data.model_copy(update={"completions": source})
    return data


def check_terms(objective: Objective, pair: Pair, outline: Outline) -> None:
    """Raises BadRequest for feature terms that do not fit: tokenizers, sides, heads and layers."""
    hidden, attention = objective.hidden, objective.attention
    for name, term in (("hidden", hidden), ("attention", attention)):
        if term is not None and not pair.has_one_tokenizer:
            refuse(
                f"student and teacher have different tokenizers, so their hidden states belong to different tokens; leave "
                f"objective.{name} out",
                f"objective.{name}",
                "tokenizer_mismatch",
            )
    if hidden is not None and hidden.side == "encoder" and outline.family != "seq2seq":
        refuse(
            f"a {outline.architecture} student has no encoder; leave side out or use decoder",
            "objective.hidden.side",
        )
    if hidden is not None and hidden.side == "encoder" and pair.teacher.family == "causal":
        refuse(
            f"a {pair.teacher.architecture} teacher has no encoder; leave side out or use decoder",
            "objective.hidden.side",
        )
    heads = attention and attention.num_relation_heads
    for facts in (pair.teacher, pair.start):
        if heads and facts.hidden_size % heads:
            refuse(
                f"num_relation_heads {heads} does not divide the hidden size {facts.hidden_size} of "
                f"{facts.architecture}; choose a divisor, or leave it out",
                "objective.attention.num_relation_heads",
            )
    for param, model, number, depth in layer_numbers(objective, pair.teacher, outline):
        if not -depth <= number < depth:
            refuse(
                f"the {model} has no layer {number}: it has {depth} layers, counted from 0, or backwards from -1",
                param,
            )


def layer_numbers(
    objective: Objective, teacher: ModelFacts, outline: Outline
) -> Iterator[tuple[str, str, int, int]]:
    """Yields (parameter, model, layer number, number of layers) for all layers of feature terms."""
    if (hidden := objective.hidden) is not None:
        for mine, theirs in hidden.layer_map or ():
            yield "objective.hidden.layer_map", "student", mine, depth_of(outline, hidden.side)
            yield "objective.hidden.layer_map", "teacher", theirs, depth_of(teacher, hidden.side)
    if (attention := objective.attention) is not None:
        yield (
            "objective.attention.student_layer",
            "student",
            attention.student_layer,
            depth_of(outline),
        )
        yield (
            "objective.attention.teacher_layer",
            "teacher",
            attention.teacher_layer,
            depth_of(teacher),
        )


def depth_of(model: ModelFacts | Outline, side: str = "auto") -> int:
    """Returns the number of layers of a side; for "auto", that of the side with more layers."""
    encoder = model.num_encoder_layers or 0
    if side == "encoder":
        return encoder or model.num_layers
    return model.num_layers if side == "decoder" else max(model.num_layers, encoder)


def check_evaluation(block: Distillation, pair: Pair) -> None:
    """Raises BadRequest if the metric of the gate is not measured, or is undefined for the pair."""
    gate, measured = block.evaluation.gate, {"kl", *block.evaluation.metrics}
    if gate is None:
        return
    if gate.metric not in measured:
        refuse(
            f"the gate uses {gate.metric}, which is not measured; add it to evaluation.metrics, or use one of "
            f"{', '.join(sorted(measured - {'speed'}))}",
            "evaluation.gate.metric",
        )
    if gate.metric in ("rouge_l", "exact_match") and pair.teacher.family == "masked":
        refuse(
            f"{pair.teacher.architecture} does not generate answers to compare with; use a gate on kl, agreement or perplexity",
            "evaluation.gate.metric",
        )
    if gate.metric in ("kl", "agreement") and not pair.has_one_tokenizer:
        refuse(
            f"{gate.metric} compares distributions over one vocabulary, and the tokenizers differ; use rouge_l or "
            "perplexity",
            "evaluation.gate.metric",
        )
