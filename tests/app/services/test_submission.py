import pytest

from app.contracts.distillation import Distillation
from app.contracts.messages import DistillationJob, ModelFacts
from app.errors import BadRequest
from app.schemas.jobs import CreateJob
from app.services import submission
from app.services.fine_tuning.student_rules import Pair


def asked(**block: object) -> CreateJob:
    method = {"type": "distillation", "distillation": {"teacher": "t", **block}}
    return CreateJob.model_validate({"model": "t", "training_file": "file-1", "method": method})


def settle(
    request: CreateJob, start_id: str = "t", row_format: str = "prompt_completion"
) -> Distillation:
    facts = ModelFacts(
        architecture="llama",
        num_layers=4,
        hidden_size=64,
        vocab_size=384,
        context_tokens=256,
        num_parameters=100_000,
        tokenizer_sha256="t",
        has_chat_template=True,
        weights_bytes=400_000,
        weights_sha256="w",
    )
    pair = Pair(facts, facts, is_same=start_id == "t", row_format=row_format)
    assert request.distillation is not None
    return submission.settle(request.distillation, request, pair)


def test_a_request_without_a_test_file_keeps_its_fingerprint() -> None:
    """Else a repetition over an upgrade would not be known, and a resumed run would take its inputs for changed."""
    evaluation = asked().model_dump(mode="json")["method"]["distillation"]["evaluation"]
    assert "test_file" not in evaluation
    named = asked(evaluation={"test_file": "file-2"}).model_dump(mode="json")["method"][
        "distillation"
    ]
    assert named["evaluation"]["test_file"] == "file-2"


def test_a_stored_job_of_before_keeps_the_first_split() -> None:
    ref = {"key": "k", "bytes": 1}
    requested = asked().distillation
    assert requested is not None
    block = requested.model_dump(mode="json")
    stored = {"distillation": block, "teacher": ref, "start": ref, "training_file": ref}
    job = DistillationJob.model_validate({**stored, "output_model": "m", "seed": 0})
    assert (job.split_version, job.test_file) == (1, None)


@pytest.mark.parametrize(
    ("start_id", "suffix", "expected"),
    [
        ("smollm2-135m", "support", "ds:smollm2-135m:support:abc"),
        ("smollm2-135m", None, "ds:smollm2-135m::abc"),
        ("ds:smollm2-135m:support:xyz", "again", "ds:smollm2-135m:again:abc"),
        ("ds:smollm2-135m:support:xyz:ckpt-step-10", "again", "ds:smollm2-135m:again:abc"),
    ],
)
def test_an_output_is_named_after_its_first_ancestor(
    start_id: str, suffix: str | None, expected: str
) -> None:
    assert submission.output_id(start_id, suffix, "abc") == expected


def test_what_was_said_is_never_overruled() -> None:
    said = {"init": "checkpoint", "freeze_head": True, "freeze_encoder": True}
    request = asked(
        student=said,
        data={"completions": "teacher"},
        objective={"teacher_signal": "text", "ce_weight": 0.0},
    )
    block, requested = settle(request), request.distillation
    assert requested is not None
    assert (block.student, block.data, block.objective.teacher_signal) == (
        requested.student,
        requested.data,
        "text",
    )


def test_naming_layers_means_taking_layers_even_from_another_model() -> None:
    assert settle(asked(student={"num_layers": 2}), start_id="other").student.init == "layers"


@pytest.mark.parametrize("row_format", ["prompt", "input", "chat_prompt"])
def test_rows_without_answers_need_the_teacher(row_format: str) -> None:
    assert settle(asked(), row_format=row_format).data.completions == "teacher"
    with pytest.raises(BadRequest):
        settle(asked(data={"completions": "dataset"}), row_format=row_format)


def test_plain_text_has_nothing_to_answer() -> None:
    with pytest.raises(BadRequest):
        settle(asked(data={"completions": "teacher"}), row_format="text")


def test_epochs_given_twice_must_agree() -> None:
    body = asked(hyperparameters={"n_epochs": 2}).model_dump(exclude_unset=True)
    agreed = CreateJob.model_validate(body | {"hyperparameters": {"n_epochs": 2}})
    assert settle(agreed).hyperparameters.n_epochs == 2
    with pytest.raises(BadRequest):
        settle(CreateJob.model_validate(body | {"hyperparameters": {"n_epochs": 3}}))
