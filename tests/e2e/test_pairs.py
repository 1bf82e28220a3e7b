"""Teachers and students of different kinds, as jobs that the stock client posts to a running service."""

import json
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.service import TEACHER, Service, assert_estimated, estimate
from tests.tiny import save_tiny

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
FAMILIES = ("gpt2", "bert", "roberta", "t5")
OTHER_WORDS = (
    "tiny-gpt2-other-words"  # causal like the service's own teacher, with another tokenizer
)
QUESTIONS = ["What is a lantern?", "Who keeps the house?", "Is the still warm?", "What runs clear?"]
Json = dict[str, Any]  # Any: JSON bodies of the public API


def name_of(family: str) -> str:
    return f"tiny-{family}"


def fresh(family: str) -> Json:
    return {"init": "fresh", "config": {"family": family, "hidden_size": 32, "num_layers": 1}}


# (teacher, start, student, signal asked for, signal used)
PAIRS = {
    "gpt2-fresh-t5": ("tiny-gpt2", "tiny-gpt2", fresh("t5"), "auto", "logits"),
    "bert-fresh-bloom": ("tiny-bert", "tiny-bert", fresh("bloom"), "auto", "conditional_mlm"),
    "roberta-fresh-encoder-decoder": (
        "tiny-roberta", "tiny-roberta", fresh("encoder-decoder"), "hidden", "hidden"
    ),
    "t5-layers": ("tiny-t5", "tiny-t5", {"init": "layers", "num_layers": 2}, "auto", "logits"),
    "other-words": (TEACHER, OTHER_WORDS, {"init": "checkpoint"}, "auto", "uld"),
}  # fmt: skip


@pytest.fixture(scope="module")
def training_file(service: Service, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows; the teachers are imported, too."""
    folder = tmp_path_factory.mktemp("pairs")
    sources: dict[str, Path] = {
        name_of(family): save_tiny(folder / family, family, num_layers=3) for family in FAMILIES
    }
    sources[OTHER_WORDS] = save_tiny(folder / "other", "gpt2", num_layers=1, kind="unigram")
    for name, source in sources.items():
        service.cli("models", "import", str(source), "--name", name)
    rows = [
        {"prompt": f"{QUESTIONS[i % 4]} {i}", "completion": "The student keeps it."}
        for i in range(24)
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with service.client() as client:
        return client.files.create(file=("rows.jsonl", content), purpose="fine-tune").id


def method(
    teacher: str, student: Json, **changes: Any
) -> Any:  # Any: the SDK's types know no distillation
    block: Json = {
        "teacher": teacher,
        "student": student,
        "data": {"max_new_tokens": 8},
        "hyperparameters": {"n_epochs": 1, "batch_tokens": 256, "max_sequence_tokens": 128},
        "evaluation": {"metrics": ["perplexity", "rouge_l"], "num_samples": 1},
    }
    return {"type": "distillation", "distillation": {**block, **changes}}


@pytest.fixture(scope="module")
def jobs(service: Service, training_file: str) -> dict[str, tuple[str, Json]]:
    """The jobs of all pairs, queued at once, with their estimates."""
    found = {}
    with service.client() as client:
        for name, (teacher, start, student, signal, _) in PAIRS.items():
            body: Json = {
                "model": start,
                "training_file": training_file,
                "method": method(teacher, student, objective={"teacher_signal": signal}),
            }
            found[name] = (client.fine_tuning.jobs.create(**body).id, estimate(client, **body))
    return found


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_distilled_and_its_student_answers(
    client: openai.OpenAI, jobs: dict[str, tuple[str, Json]], name: str
) -> None:
    deadline = time.monotonic() + 300
    job_id, estimated = jobs[name]
    job = client.fine_tuning.jobs.retrieve(job_id)
    while job.status in {"queued", "running"} and time.monotonic() < deadline:
        time.sleep(0.3)
        job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
    assert job.model_dump()["result"]["teacher_signal"] == PAIRS[name][-1]
    assert_estimated(estimated, job)
    answer = client.completions.create(
        model=job.fine_tuned_model or "", prompt=QUESTIONS[0], max_tokens=6, temperature=0
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0
    assert answer.choices[0].finish_reason in {"stop", "length"}


@pytest.mark.parametrize(
    ("teacher", "start", "student", "changes", "hint"),
    [
        (
            "tiny-bert", "tiny-bert", fresh("bloom"), {"objective": {"teacher_signal": "logits"}},
            "use objective.teacher_signal = conditional_mlm or hidden",
        ),
        ("tiny-bert", "tiny-bert", {"init": "layers"}, {}, "use student.init = fresh with student.config"),
        (
            TEACHER, OTHER_WORDS, {"init": "checkpoint"}, {"evaluation": {"gate": {"metric": "kl", "at_most": 1}}},
            "use rouge_l or perplexity",
        ),
    ],
    ids=["next tokens of a masked teacher", "layers of a masked model", "kl gate across tokenizers"],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_what_does(
    client: openai.OpenAI,
    training_file: str,
    teacher: str,
    start: str,
    student: Json,
    changes: Json,
    hint: str,
) -> None:
    with pytest.raises(openai.BadRequestError, match=hint) as refusal:
        client.fine_tuning.jobs.create(
            model=start, training_file=training_file, method=method(teacher, student, **changes)
        )
    assert refusal.value.status_code == 400
