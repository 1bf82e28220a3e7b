"""The unmodified `openai` client drives the whole main job over HTTP."""

import json
import time
from typing import Any

import httpx
import openai
import pytest
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

from tests.e2e.service import TEACHER, Service

pytestmark = pytest.mark.e2e
Json = dict[str, Any]  # Any: JSON bodies of the public API
QUESTIONS = [
    "What is a lantern?",
    "Who keeps the house?",
    "Is the still warm?",
    "Ask a short question.",
    "What runs clear?",
]


def rows(num_rows: int, *, start: int = 0) -> bytes:
    lines = [
        {
            "prompt": f"{QUESTIONS[i % len(QUESTIONS)]} {i}",
            "completion": f"The answer is {i}, and it is short.",
        }
        for i in range(start, start + num_rows)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def method(**changes: Any) -> Any:  # Any: the SDK's types know no distillation method
    block: Json = {
        "teacher": TEACHER,
        "student": {"init": "layers", "num_layers": 2},
        "hyperparameters": {
            "n_epochs": 8,
            "learning_rate": 0.002,  # the default suits trained teachers
            "batch_tokens": 128,
            "max_sequence_tokens": 96,
            "eval_steps": 4,
            "checkpoint_steps": 4,
        },
        "evaluation": {"num_samples": 1},
    }
    return {"type": "distillation", "distillation": {**block, **changes}}


def wait(client: openai.OpenAI, job_id: str, *, seconds: float = 300) -> FineTuningJob:
    """Poll as the samples in OpenAI's documentation do."""
    deadline = time.monotonic() + seconds
    job = client.fine_tuning.jobs.retrieve(job_id)
    while job.status in {"validating_files", "queued", "running"} and time.monotonic() < deadline:
        time.sleep(0.3)
        job = client.fine_tuning.jobs.retrieve(job_id)
    return job


@pytest.fixture(scope="module")
def files(service: Service) -> tuple[str, str]:
    with service.client() as client:
        training = client.files.create(file=("train.jsonl", rows(40)), purpose="fine-tune")
        validation = client.files.create(
            file=("valid.jsonl", rows(8, start=1000)), purpose="fine-tune"
        )
    return training.id, validation.id


@pytest.fixture(scope="module")
def finished(service: Service, files: tuple[str, str]) -> FineTuningJob:
    """A job that has run to its end; several tests look at it."""
    with service.client() as client:
        job = client.fine_tuning.jobs.create(
            model=TEACHER, training_file=files[0], validation_file=files[1], suffix="support", seed=7,
            method=method(), metadata={"team": "x"},
        )  # fmt: skip
        assert job.status in {"queued", "running"}
        job = wait(client, job.id)
    assert job.status == "succeeded", job.error
    return job


def extra(job: FineTuningJob, name: str) -> Any:  # Any: fields beyond the SDK's own types
    return getattr(job, name)


def test_a_job_ends_with_a_model_and_a_result(
    client: openai.OpenAI, finished: FineTuningJob
) -> None:
    assert finished.fine_tuned_model is not None
    assert finished.fine_tuned_model.startswith("ds:")
    assert "/" not in finished.fine_tuned_model
    assert finished.seed == 7
    assert finished.metadata == {"team": "x"}
    assert finished.finished_at is not None
    assert (finished.trained_tokens or 0) > 0
    result = extra(finished, "result")
    assert result["student"]["kl"] < result["untrained"]["kl"]
    assert result["student"]["num_layers"] == 2
    model = client.models.retrieve(finished.fine_tuned_model)
    assert model.object == "model"
    assert finished.fine_tuned_model in [m.id for m in client.models.list()]


def test_events_come_newest_first_and_page_to_the_oldest(
    client: openai.OpenAI, finished: FineTuningJob
) -> None:
    first = client.fine_tuning.jobs.list_events(finished.id, limit=2)
    assert len(first.data) == 2
    assert first.has_more
    events = list(client.fine_tuning.jobs.list_events(finished.id, limit=2))
    assert len({event.id for event in events}) == len(events) > 4
    assert [e.created_at for e in events] == sorted((e.created_at for e in events), reverse=True)
    assert any(event.type == "metrics" for event in events)


def test_events_stream_to_the_stock_client_until_the_job_has_ended(
    client: openai.OpenAI, finished: FineTuningJob
) -> None:
    stream = client.get(
        f"/fine_tuning/jobs/{finished.id}/events",
        cast_to=FineTuningJobEvent,
        stream=True,
        stream_cls=openai.Stream[FineTuningJobEvent],
        options={"params": {"stream": "true"}},
    )
    streamed = [event.id for event in stream]
    paged = [event.id for event in client.fine_tuning.jobs.list_events(finished.id)]
    assert streamed == paged[::-1]


def test_metrics_are_series_over_steps(service: Service, finished: FineTuningJob) -> None:
    answer = httpx.get(
        f"{service.url}/v1/fine_tuning/jobs/{finished.id}/metrics",
        headers={"Authorization": f"Bearer {service.key}"},
    )
    assert answer.status_code == 200
    assert "train_loss" in answer.text
    assert "valid_kl" in answer.text


def test_checkpoints_are_listed_and_can_be_asked(
    client: openai.OpenAI, finished: FineTuningJob
) -> None:
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(finished.id))
    assert checkpoints
    newest = checkpoints[0]
    assert newest.fine_tuning_job_id == finished.id
    assert newest.step_number > 0
    model = client.models.retrieve(newest.fine_tuned_model_checkpoint)
    assert model.id == newest.fine_tuned_model_checkpoint
    assert model.to_dict()["job_id"] == finished.id
    answer = client.completions.create(
        model=newest.fine_tuned_model_checkpoint,
        prompt="What is a lantern?",
        max_tokens=4,
        temperature=0,
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


def test_a_streamed_answer_equals_the_whole_one(
    client: openai.OpenAI, finished: FineTuningJob
) -> None:
    model = finished.fine_tuned_model or ""
    messages: Any = [{"role": "user", "content": "What is a lantern?"}]
    whole = client.chat.completions.create(
        model=model, messages=messages, max_tokens=24, temperature=0
    )
    parts = client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage = "", None
    for part in parts:
        text += "".join(choice.delta.content or "" for choice in part.choices)
        usage = part.usage or usage
    assert text == whole.choices[0].message.content
    assert usage is not None
    assert whole.usage is not None
    assert usage.total_tokens == whole.usage.total_tokens


def test_n_samples_with_a_seed_come_out_the_same_twice(
    client: openai.OpenAI, finished: FineTuningJob
) -> None:
    def ask() -> list[str]:
        answer = client.completions.create(
            model=finished.fine_tuned_model or "",
            prompt="Who keeps the house?",
            n=3,
            seed=11,
            temperature=1.0,
            max_tokens=16,
        )
        return [choice.text for choice in answer.choices]

    first = ask()
    assert first == ask()
    assert len(set(first)) > 1


def test_teacher_answers_prompts_that_have_none(client: openai.OpenAI) -> None:
    lines = "".join(json.dumps({"prompt": f"{q} {i}"}) + "\n" for i, q in enumerate(QUESTIONS * 3))
    file = client.files.create(file=("prompts.jsonl", lines.encode()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=TEACHER,
        training_file=file.id,
        method=method(data={"completions": "teacher", "max_new_tokens": 12}),
    )
    job = wait(client, job.id)
    assert job.status == "succeeded", job.error
    assert "generating_teacher_data" in [stage["name"] for stage in extra(job, "stages")]


def test_the_same_idempotency_key_gives_the_same_job(
    client: openai.OpenAI, files: tuple[str, str]
) -> None:
    def create(seed: int) -> FineTuningJob:
        return client.fine_tuning.jobs.create(
            model=TEACHER,
            training_file=files[0],
            seed=seed,
            method=method(),
            extra_headers={"Idempotency-Key": "run-42"},
        )

    first = create(1)
    assert create(1).id == first.id
    with pytest.raises(openai.UnprocessableEntityError, match="Idempotency-Key"):
        create(2)
    client.fine_tuning.jobs.cancel(first.id)


def test_a_running_job_is_cancelled_and_leaves_no_model(
    client: openai.OpenAI, files: tuple[str, str]
) -> None:
    before = {model.id for model in client.models.list()}
    long = method(
        hyperparameters={
            "n_epochs": 900,
            "batch_tokens": 128,
            "eval_steps": 100000,
            "checkpoint_steps": 50,
        }
    )
    job = client.fine_tuning.jobs.create(model=TEACHER, training_file=files[0], method=long)
    wait_for_step(client, job.id, 3)
    client.fine_tuning.jobs.cancel(job.id)
    job = wait(client, job.id, seconds=30)
    assert job.status == "cancelled"
    assert {model.id for model in client.models.list()} == before
    # a repeated cancel is no error
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"


def test_a_finished_job_cannot_be_cancelled(client: openai.OpenAI, finished: FineTuningJob) -> None:
    with pytest.raises(openai.ConflictError, match="succeeded"):
        client.fine_tuning.jobs.cancel(finished.id)


def wait_for_step(client: openai.OpenAI, job_id: str, step: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        job = client.fine_tuning.jobs.retrieve(job_id)
        assert job.status in {"queued", "running"}, job.error
        if (extra(job, "progress") or {}).get("step", 0) and extra(job, "progress")["step"] >= step:
            return
        time.sleep(0.2)
    raise AssertionError(f"{job_id} did not reach step {step}")


def test_a_job_pauses_at_a_checkpoint_and_goes_on_from_it(
    client: openai.OpenAI, files: tuple[str, str]
) -> None:
    long = method(
        hyperparameters={
            "n_epochs": 200,
            "max_steps": 500,
            "batch_tokens": 128,
            "eval_steps": 100000,
            "checkpoint_steps": 100000,
        }
    )
    job = client.fine_tuning.jobs.create(model=TEACHER, training_file=files[0], method=long)
    wait_for_step(client, job.id, 3)
    client.fine_tuning.jobs.pause(job.id)
    paused = wait(client, job.id, seconds=60)
    assert str(paused.status) == "paused"
    step = next(iter(client.fine_tuning.jobs.checkpoints.list(job.id))).step_number
    assert step >= 3
    client.fine_tuning.jobs.resume(job.id)
    job = wait(client, job.id)
    assert job.status == "succeeded", job.error
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
    assert any(f"step {step}" in message for message in messages), messages


def test_another_project_sees_none_of_it(
    service: Service, finished: FineTuningJob, files: tuple[str, str]
) -> None:
    with service.client(service.new_key("stranger")) as stranger:
        for reach in (
            lambda: stranger.fine_tuning.jobs.retrieve(finished.id),
            lambda: stranger.fine_tuning.jobs.cancel(finished.id),
            lambda: stranger.fine_tuning.jobs.list_events(finished.id),
            lambda: stranger.fine_tuning.jobs.checkpoints.list(finished.id),
            lambda: stranger.files.retrieve(files[0]),
            lambda: stranger.files.delete(files[0]),
            lambda: stranger.models.retrieve(finished.fine_tuned_model or ""),
            lambda: stranger.models.delete(finished.fine_tuned_model or ""),
            lambda: stranger.completions.create(model=finished.fine_tuned_model or "", prompt="a"),
            lambda: stranger.fine_tuning.jobs.create(
                model=TEACHER, training_file=files[0], method=method()
            ),
        ):
            with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
                reach()
        assert list(stranger.fine_tuning.jobs.list()) == []
        assert list(stranger.files.list()) == []


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"student": {"init": "layers", "num_layers": 9}}, "num_layers", "invalid_value"),
        ({"teacher": "nobody"}, "teacher", "model_not_found"),
        ({"lambda": 0.5}, "lambda", "unknown_parameter"),
        ({"objective": {"divergence": "wasserstein"}}, "divergence", "invalid_value"),
        ({"objective": {"temperature": 1e9}}, "temperature", "invalid_value"),
        ({"objective": {}, "loss": {"type": "fkl"}}, "distillation", "invalid_value"),
        ({"loss": {"type": "fkl", "gamma": 1}}, "gamma", "unknown_parameter"),
        (
            {"hyperparameters": {"max_sequence_tokens": 8}},
            "training_file",
            "context_length_exceeded",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_submission(
    client: openai.OpenAI, files: tuple[str, str], changes: Json, param: str, code: str
) -> None:
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as refused:
        client.fine_tuning.jobs.create(
            model=TEACHER, training_file=files[0], method=method(**changes)
        )
    assert param in (refused.value.param or "")
    assert refused.value.code == code
    assert len(refused.value.message) > 20


def test_the_documented_stock_flow_runs_as_written(
    service: Service, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("flow") / "p.jsonl"
    path.write_bytes(rows(20))
    with service.client() as c:
        with path.open("rb") as opened:
            f = c.files.create(file=opened, purpose="fine-tune")
        j = c.fine_tuning.jobs.create(
            model=TEACHER,
            training_file=f.id,
            method={  # type: ignore[arg-type]  # the SDK's types know no distillation method; it sends it as it is
                "type": "distillation",
                "distillation": {"teacher": TEACHER, "loss": {"type": "fkl", "temperature": 2}},
            },
            extra_headers={"Idempotency-Key": "run-42-stock"},
        )
        stream = c.get(
            f"/fine_tuning/jobs/{j.id}/events",
            cast_to=FineTuningJobEvent,
            stream=True,
            stream_cls=openai.Stream[FineTuningJobEvent],
            options={"params": {"stream": "true"}},
        )
        assert [(e.type, e.data) for e in stream]
        j = c.fine_tuning.jobs.retrieve(j.id)
        assert extra(j, "progress")["percent"] == 100
        assert hasattr(j, "stage")
        assert j.fine_tuned_model is not None
        answer = c.completions.create(
            model=j.fine_tuned_model,
            prompt="What is a lantern?",
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"top_k": 20},
        )
        assert list(answer)[-1].usage is not None
