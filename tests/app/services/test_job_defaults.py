"""Each pair that cannot work is refused with what does work; what was left open is decided and shown."""

from typing import Any

import pytest

from app.contracts.distillation import Distillation
from app.contracts.messages import ModelFacts
from app.errors import BadRequest
from app.services.fine_tuning.student_rules import Pair
from app.services.job_defaults import EXPORTABLE, settle
from worker.models.architectures import CAUSAL, MASKED, SEQ2SEQ

Json = dict[str, Any]  # Any: open-ended JSON
FRESH: Json = {"init": "fresh", "config": {"family": "encoder-decoder", "num_layers": 2}}
HIDDEN = {"objective": {"teacher_signal": "hidden"}}


def facts(architecture: str, **changes: Any) -> ModelFacts:
    """A model of four layers (of an encoder, six), whose tokenizer is called `shared`."""
    family = (
        "masked" if architecture in MASKED else "seq2seq" if architecture in SEQ2SEQ else "causal"
    )
    sides = {"num_encoder_layers": 6, "num_decoder_layers": 4} if family == "seq2seq" else {}
    return ModelFacts.model_validate(
        {
            "architecture": architecture,
            "family": family,
            "num_layers": 4,
            "hidden_size": 64,
            "vocab_size": 384,
            "context_tokens": 256,
            "num_parameters": 100_000,
            "tokenizer_sha256": "shared",
            "has_chat_template": False,
            "weights_bytes": 400_000,
            "weights_sha256": "w",
            **sides,
            **changes,
        }
    )


def decide(
    block: Json | None = None,
    teacher: str = "llama",
    start: str | None = None,
    *,
    rows: str = "prompt_completion",
    other_tokenizer: bool = False,
) -> Distillation:
    """What is settled for a teacher and a start; without a start, the teacher is both."""
    from_teacher = facts(teacher)
    from_start = facts(start or teacher, tokenizer_sha256="other" if other_tokenizer else "shared")
    pair = Pair(from_teacher, from_start, is_same=start is None, row_format=rows)
    return settle(Distillation.model_validate({"teacher": "t", **(block or {})}), pair)


def refused(*arguments: Any, **options: Any) -> tuple[str, str, str]:
    with pytest.raises(BadRequest) as caught:
        decide(*arguments, **options)
    error = caught.value
    return (error.param or "").removeprefix("method.distillation."), error.code, error.message


@pytest.mark.parametrize(
    ("student", "start"),
    [({"init": "checkpoint"}, "t5"), ({"init": "fresh", "config": {"family": "t5"}}, "t5")],
)
def test_only_causal_students_have_a_vocabulary_of_the_rows(student: Json, start: str) -> None:
    param, _, message = refused({"student": {**student, "vocabulary": "rows"}}, start)
    assert param == "student.vocabulary"
    assert "t5 model cannot be trimmed" in message
    assert decide({"student": {"vocabulary": "rows"}}).student.vocabulary == "rows"


@pytest.mark.parametrize("teacher", MASKED)
@pytest.mark.parametrize("signal", ["logits", "uld", "text"])
def test_a_masked_teacher_has_no_next_token_distribution(teacher: str, signal: str) -> None:
    param, code, message = refused(
        {"student": FRESH, "objective": {"teacher_signal": signal}}, teacher
    )
    assert (param, code) == ("objective.teacher_signal", "invalid_value")
    assert message == (
        f"{teacher} has no next-token distribution; use objective.teacher_signal = conditional_mlm or hidden"
    )


@pytest.mark.parametrize("teacher", MASKED)
@pytest.mark.parametrize("start", ["t5", "bloom", "encoder-decoder"])
def test_a_masked_teacher_fills_in_the_targets_unless_its_states_are_asked_for(
    teacher: str, start: str
) -> None:
    assert decide({}, teacher, start).objective.teacher_signal == "conditional_mlm"
    hidden = decide(HIDDEN, teacher, start).objective
    assert (hidden.teacher_signal, hidden.hidden is not None) == ("hidden", True)


@pytest.mark.parametrize("rows", ["prompt", "input"])
def test_a_masked_teacher_answers_no_prompts(rows: str) -> None:
    param, _, message = refused({"student": FRESH}, "bert", rows=rows)
    assert (param, "upload rows that have completions" in message) == ("training_file", True)
    asked = {"student": FRESH, "data": {"completions": "teacher"}}
    assert refused(asked, "bert")[0] == "data.completions"


@pytest.mark.parametrize(
    "student", [{}, {"init": "layers"}, {"init": "checkpoint"}, {"init": "lora"}]
)
def test_no_student_starts_from_a_masked_model(student: Json) -> None:
    param, _, message = refused({"student": student}, "roberta")
    assert (param, "student.init = fresh" in message) == ("model", True)
    assert refused({"student": student}, "gpt2", "roberta")[0] == "model"


def test_a_fresh_student_takes_the_teachers_tokenizer_alone() -> None:
    for teacher in ("bert", "gpt2", "t5"):
        assert decide({"student": FRESH}, teacher).student.config is not None
    assert refused({"student": FRESH}, "gpt2", "gpt2", other_tokenizer=True)[:2] == (
        "model",
        "tokenizer_mismatch",
    )
    assert refused({"student": FRESH}, "gpt2", "bert")[0] == "model"


@pytest.mark.parametrize("teacher", [*CAUSAL, *SEQ2SEQ])
def test_only_a_masked_teacher_fills_in_masks(teacher: str) -> None:
    param, _, message = refused({"objective": {"teacher_signal": "conditional_mlm"}}, teacher)
    assert (param, "use logits" in message) == ("objective.teacher_signal", True)


@pytest.mark.parametrize(
    ("teacher", "start", "signal"),
    [
        ("gpt2", "bloom", "uld"),
        ("t5", "bart", "uld"),
        ("gpt2", "t5", "text"),
        ("t5", "llama", "text"),
    ],
)
def test_different_tokenizers_settle_for_what_can_be_compared(
    teacher: str, start: str, signal: str
) -> None:
    for student in ({}, {"init": "lora"}):
        block = decide({"student": student}, teacher, start, other_tokenizer=True)
        assert block.objective.teacher_signal == signal
        assert block.data.completions == ("teacher" if signal == "text" else "dataset")
        assert block.objective.ce_weight == (signal == "text")
    one = decide({}, teacher, start)
    assert (one.objective.teacher_signal, one.objective.ce_weight) == ("logits", 0)


@pytest.mark.parametrize("student", [{"layer_choice": "first_and_last"}, {"fit_rows": 9}])
def test_options_of_layers_make_a_student_of_layers(student: Json) -> None:
    assert decide({"student": student}, "gpt2", "gpt2").student.init == "layers"
    assert decide({"student": {}}, "gpt2", "gpt2").student.init == "checkpoint"


@pytest.mark.parametrize("signal", ["logits", "hidden"])
def test_different_tokenizers_are_not_compared_token_by_token(signal: str) -> None:
    param, code, message = refused(
        {"objective": {"teacher_signal": signal}}, "gpt2", "bloom", other_tokenizer=True
    )
    assert (param, code) == ("objective.teacher_signal", "tokenizer_mismatch")
    assert "objective.teacher_signal = uld or text" in message
    for term in ("hidden", "attention"):
        asked: Json = {"objective": {term: {}}}
        assert refused(asked, "gpt2", "bloom", other_tokenizer=True)[:2] == (
            f"objective.{term}",
            "tokenizer_mismatch",
        )


def test_a_masked_teacher_and_a_student_of_another_tokenizer_share_nothing() -> None:
    param, code, message = refused({}, "bert", "t5", other_tokenizer=True)
    assert (param, code, "fresh" in message) == ("model", "tokenizer_mismatch", True)


def test_plain_text_gives_nobody_a_prompt() -> None:
    for source in ("teacher", "student", "replay"):
        assert refused({"data": {"completions": source}}, rows="text")[0] == "data.completions"
    then = {"objective": {"then": {"divergence": "reverse_kl", "completions": "student"}}}
    assert refused(then, rows="text")[0] == "objective.then.completions"
    assert refused({}, "gpt2", "t5", rows="text", other_tokenizer=True)[0] == "training_file"
    assert (
        decide({}, "gpt2", "bloom", rows="text", other_tokenizer=True).data.completions == "dataset"
    )


def test_only_next_token_distributions_judge_the_students_answers() -> None:
    then: Json = {"objective": {"then": {"divergence": "reverse_kl", "completions": "replay"}}}
    for teacher, student, other in (
        ("bert", "gpt2", False),
        ("gpt2", "bloom", True),
        ("gpt2", "t5", True),
    ):
        for source in ("student", "replay"):
            asked = {"data": {"completions": source}}
            param, _, message = refused(asked, teacher, student, other_tokenizer=other)
            assert (param, "dataset or teacher" in message) == ("data.completions", True)
        assert (
            refused(then, teacher, student, other_tokenizer=other)[0]
            == "objective.then.completions"
        )
    assert decide(then, "gpt2", "t5").objective.then == decide(then).objective.then


def test_answers_of_the_student_are_trained_by_one_process() -> None:
    devices: Json = {"hyperparameters": {"num_devices": 2}}
    assert decide(devices).hyperparameters.num_devices == 2
    for source in ("student", "replay"):
        param, _, _ = refused({"data": {"completions": source}} | devices)
        assert param == "hyperparameters.num_devices"
    assert "num_devices" not in decide({}).model_dump_json()  # old jobs keep their fingerprints


def test_chats_need_a_chat_template() -> None:
    assert refused({}, rows="chat")[0] == "training_file"


def test_only_some_models_are_made_narrower() -> None:
    width = {"student": {"init": "width", "hidden_size": 32}}
    narrowed = {"gpt2", "llama", "mistral", "qwen2", "qwen3", "smollm3", "t5"}
    for start in (*CAUSAL, *SEQ2SEQ):
        if start not in narrowed:
            param, _, message = refused(width, start)
            assert (param, "use student.init = layers" in message) == ("student.init", True)
        else:
            assert decide(width, start).student.init == "width"

    wide = {"student": {"init": "width", "hidden_size": 128}}
    assert refused(wide, "gpt2")[0] == "student.hidden_size"


@pytest.mark.parametrize(
    ("config", "param"),
    [
        ({"family": "llama", "hidden_size": 36, "num_heads": 4}, "num_heads"),
        ({"family": "bloom", "intermediate_size": 100}, "intermediate_size"),
        ({"family": "gpt2", "num_encoder_layers": 2}, "num_layers"),
        ({"family": "bloom", "num_decoder_layers": 2}, "num_layers"),
    ],
)
def test_sizes_that_no_model_can_have_are_refused(config: Json, param: str) -> None:
    assert refused({"student": {"init": "fresh", "config": config}})[0] == f"student.config.{param}"


@pytest.mark.parametrize(
    ("student", "param"),
    [
        ({"num_layers": 5}, "num_layers"),
        ({"num_layers": [2, 5]}, "num_layers"),
        ({"layers": [0, 4]}, "layers"),
        ({"num_encoder_layers": 7}, "num_encoder_layers"),
        ({"num_decoder_layers": 5}, "num_decoder_layers"),
        ({"num_layers": 2, "num_decoder_layers": 3}, "num_decoder_layers"),
        ({"num_layers": [1, 2], "num_decoder_layers": 2}, "num_decoder_layers"),
    ],
)
def test_layers_are_of_those_there_are(student: Json, param: str) -> None:
    assert refused({"student": student}, "t5")[0] == f"student.{param}"


def test_both_sides_and_ladders_within_range_are_taken() -> None:
    sides: Json = {"num_encoder_layers": 6, "num_decoder_layers": 4}
    assert decide({"student": sides}, "t5").student.init == "layers"
    assert decide({"student": {"num_layers": [4, 1, 2]}}).student.ladder == (1, 2, 4)
    for name in sides:
        assert refused({"student": {name: 2}}, "gpt2")[0] == f"student.{name}"


@pytest.mark.parametrize(
    ("student", "start", "head", "encoder"),
    [
        ({"num_layers": 2}, None, True, True),
        ({"num_layers": 2, "num_encoder_layers": 6}, None, True, True),
        ({"num_layers": 2, "num_encoder_layers": 3}, None, True, False),
        ({"init": "checkpoint"}, None, False, False),
        ({"init": "lora"}, None, False, False),
        ({"freeze_head": True, "freeze_encoder": True}, "bart", True, True),
        (FRESH, None, False, False),
    ],
)
def test_what_is_frozen_is_shown(
    student: Json, start: str | None, head: bool, encoder: bool
) -> None:
    settled = decide({"student": student}, "t5", start).student
    assert (settled.freeze_head, settled.freeze_encoder) == (head, encoder)


@pytest.mark.parametrize(
    ("side", "pairs", "fits"),
    [
        ("decoder", [[1, 3], [-1, -1]], True),
        ("decoder", [[2, 3]], False),
        ("decoder", [[1, 4]], False),
        ("decoder", [[-3, 0]], False),
        ("encoder", [[5, 5]], True),
        ("encoder", [[6, 5]], False),
        ("auto", [[5, 5]], True),
        ("auto", [[0, 6]], False),
    ],
)
def test_layer_maps_name_layers_that_exist(side: str, pairs: list[list[int]], fits: bool) -> None:
    asked = {
        "student": {"num_layers": 2},
        "objective": {"hidden": {"side": side, "layer_map": pairs}},
    }
    if fits:
        assert decide(asked, "bart").objective.hidden is not None
    else:
        assert refused(asked, "bart")[0] == "objective.hidden.layer_map"


def test_feature_terms_look_at_what_is_there() -> None:
    assert refused({"objective": {"hidden": {"side": "encoder"}}})[0] == "objective.hidden.side"
    from_encoder: Json = {"student": FRESH, "objective": {"hidden": {"side": "encoder"}}}
    assert refused(from_encoder, "gpt2")[0] == "objective.hidden.side"
    for start in ("t5", "gpt2"):
        assert decide({"objective": {"attention": {}}}, start).objective.attention is not None
    heads: Json = {"objective": {"attention": {"num_relation_heads": 7}}}
    assert refused(heads, "gpt2")[0] == "objective.attention.num_relation_heads"
    asked: Json = {"objective": {"attention": {"student_layer": 2}}}  # half of four are kept
    assert refused(asked, "gpt2")[0] == "objective.attention.student_layer"
    narrow = {"init": "width", "hidden_size": 32}
    assert decide({**asked, "student": narrow}, "gpt2").student.init == "width"
    assert refused({**asked, "student": {**narrow, "num_layers": [2, 4]}}, "gpt2")[0].endswith(
        "student_layer"
    )


def test_a_gate_is_measured() -> None:
    def gate(metric: str, *metrics: str) -> Json:
        return {"evaluation": {"metrics": metrics, "gate": {"metric": metric, "at_least": 0.5}}}

    param, _, message = refused(gate("accuracy", "perplexity"))
    assert (param, message.endswith("use one of kl, perplexity")) == (
        "evaluation.gate.metric",
        True,
    )
    assert decide(gate("kl")).evaluation.gate is not None
    assert decide(gate("macro_f1", "macro_f1")).evaluation.gate is not None
    agreement = gate("agreement", "agreement")
    assert refused(agreement, "gpt2", "bloom", other_tokenizer=True)[0] == "evaluation.gate.metric"


def test_a_masked_teacher_has_no_answers_to_gate_on_and_others_are_not_adapted() -> None:
    gate = {"gate": {"metric": "rouge_l", "at_least": 0.5}}
    assert refused({"student": FRESH, "evaluation": gate}, "bert")[0] == "evaluation.gate.metric"
    steps: Json = {"objective": {"adaptation_steps": 10}}
    assert refused(steps, "gpt2")[0] == "objective.adaptation_steps"
    assert decide({"student": FRESH, **steps}, "bert").objective.adaptation_steps == 10


def test_only_what_can_be_written_is_exported() -> None:
    assert "gpt2" in EXPORTABLE
    for start in (*CAUSAL, *SEQ2SEQ):
        if start in EXPORTABLE:
            assert decide({"export": ["gguf_f16"]}, start).export == ("gguf_f16",)
        else:
            assert refused({"export": ["gguf_f16"]}, start)[0] == "export"
    assert refused({"export": ["gguf_f16"], "student": FRESH}, "gpt2")[0] == "export"


def test_a_teacher_whose_layers_cannot_be_quantised_is_refused() -> None:
    param, _, message = refused({"teacher_precision": "int8"}, "gpt2")
    assert param == "teacher_precision"
    assert "gpt2 teacher cannot be quantised" in message
    assert decide({"teacher_precision": "int8"}).teacher_precision == "int8"
    assert decide(teacher="gpt2").teacher_precision == "auto"


@pytest.mark.parametrize(("precision", "multiple"), [("int4", 32), ("fp8", 16)])
def test_a_hidden_size_that_the_precision_does_not_support_is_refused(
    precision: str, multiple: int
) -> None:
    teacher = facts("llama", hidden_size=multiple + 8)
    pair = Pair(teacher, teacher, is_same=True, row_format="prompt_completion")
    block = Distillation.model_validate({"teacher": "t", "teacher_precision": precision})
    with pytest.raises(BadRequest, match=f"multiples of {multiple}"):
        settle(block, pair)
    assert decide({"teacher_precision": precision}).teacher_precision == precision


def test_requests_without_a_precision_keep_their_fingerprints() -> None:
    assert "teacher_precision" not in decide().model_dump(mode="json")
