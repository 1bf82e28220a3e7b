"""Fine-tuning jobs as the `openai` client submits them, without a teacher."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.fine_tuning import FineTuningJob
from sqlalchemy import update

from app.contracts.messages import DistillationJob
from app.db import jobs as job_rows
from app.db import leases
from app.db.schema.tables import Model
from app.db.session import transaction
from app.storage import store
from tests.app.api.conftest import Service

Submit = Callable[..., FineTuningJob]
Json = dict[str, Any]  # Any: JSON bodies of the public API
ROWS = [{"prompt": f"What is {n}?", "completion": "A number."} for n in range(20)]
INNER = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}


@pytest.fixture
def training_file(client: openai.OpenAI, upload: Callable[..., str]) -> str:
    return upload(client, ROWS)


@pytest.fixture
def submit(client: openai.OpenAI, register: Callable[..., str], training_file: str) -> Submit:
    model = register()

    def do_submit(**options: Any) -> FineTuningJob:
        return client.fine_tuning.jobs.create(
            **{"model": model, "training_file": training_file, **options}
        )

    return do_submit


def spec_of(job: FineTuningJob) -> DistillationJob:
    with transaction() as session:
        row = job_rows.load_job(session, job.id)
        assert row is not None
        return DistillationJob.model_validate(row.spec)


def start(job: FineTuningJob) -> int:
    with transaction() as session:
        claimed = leases.claim(session, f"worker/{time.monotonic()}", 90.0)
        assert claimed is not None
        assert claimed.id == job.id
        assert claimed.lease_token is not None
        return claimed.lease_token


def test_a_job_without_a_method_is_supervised(client: openai.OpenAI, submit: Submit) -> None:
    job = submit()
    assert job.method is not None
    assert job.method.type == "supervised"
    assert job.method.supervised is not None
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    assert job.hyperparameters.to_dict() == auto
    assert job.method.supervised.hyperparameters is not None
    assert job.method.supervised.hyperparameters.to_dict() == auto
    assert (job.status, job.seed, job.integrations) == ("queued", 0, None)
    assert (job.model_extra or {})["teacher"] is None
    spec = spec_of(job)
    assert (spec.method, spec.teacher) == ("supervised", spec.start)
    assert (spec.distillation.student.init, spec.distillation.student.freeze_head) == (
        "checkpoint",
        False,
    )
    start(job)
    later = client.fine_tuning.jobs.retrieve(job.id).hyperparameters.to_dict()
    assert later == {"n_epochs": 5, "batch_size": "auto", "learning_rate_multiplier": 1.0}


@pytest.mark.parametrize("method", [{"type": "supervised"}, INNER])
def test_the_inner_object_of_the_method_is_optional(submit: Submit, method: Json) -> None:
    job = submit(method=method)
    assert job.hyperparameters.n_epochs == ("auto" if method != INNER else 2)


@pytest.mark.parametrize("place", ["top", "inner", "both"])
def test_hyperparameters_are_read_from_both_places_and_echoed(submit: Submit, place: str) -> None:
    numbers = {"n_epochs": 4, "batch_size": 8, "learning_rate_multiplier": 1.5}
    options: Json = {}
    if place != "inner":
        options["hyperparameters"] = numbers
    if place != "top":
        options["method"] = {"type": "supervised", "supervised": {"hyperparameters": numbers}}
    job = submit(**options)
    assert job.hyperparameters.to_dict() == numbers
    ours = spec_of(job).distillation.hyperparameters
    assert (ours.n_epochs, ours.batch_rows, ours.learning_rate_multiplier) == (4, 8, 1.5)


def test_a_distillation_reads_openais_hyperparameters_too(submit: Submit) -> None:
    method = {"type": "distillation", "distillation": {"teacher": "tiny"}}
    job = submit(method=method, hyperparameters={"batch_size": 4, "learning_rate_multiplier": 2})
    ours = spec_of(job).distillation.hyperparameters
    assert (ours.batch_rows, ours.learning_rate_multiplier, ours.n_epochs) == (4, 2.0, 3)


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        (
            {"method": INNER, "hyperparameters": {"n_epochs": 3}},
            "hyperparameters.n_epochs",
            "given twice",
        ),
        (
            {"hyperparameters": {"batch_size": 300}},
            "hyperparameters.batch_size",
            "less than or equal to 256",
        ),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 0}}}},
            "method.supervised.hyperparameters.n_epochs",
            "greater than or equal to 1",
        ),
        ({"method": {"type": "dpo"}}, "method.type", "preferred answers"),
        (
            {"method": {"type": "reinforcement", "reinforcement": {"grader": {}}}},
            "method.type",
            "distillation",
        ),
        ({"method": {"type": "magic"}}, "method", "'supervised', 'distillation'"),
        (
            {"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]},
            "integrations",
            "set STILLHOUSE_WANDB_API_KEY",
        ),
        ({"seed": 2**31}, "seed", "less than or equal"),
        ({"model": "gone"}, "model", "does not exist"),
    ],
)
def test_what_cannot_be_done_is_refused_at_submission(
    client: openai.OpenAI, submit: Submit, options: Json, param: str, words: str
) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        submit(**options)
    assert refused.value.status_code in (400, 404)
    assert refused.value.param == param
    assert words in refused.value.message
    assert client.fine_tuning.jobs.list().data == []


def test_rows_and_models_that_do_not_fit_are_refused(
    client: openai.OpenAI, submit: Submit, upload: Callable[..., str], register: Callable[..., str]
) -> None:
    chat = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}]  # fmt: skip
    cases: list[tuple[Json, str, str]] = [
        ({"training_file": upload(client, [{"prompt": "Hi"}])}, "training_file", "no answers"),
        ({"training_file": upload(client, [{"messages": chat[0]["messages"][:1]}])}, "training_file", "no answers"),
        ({"model": register("masked", family="masked")}, "model", "cannot be fine-tuned"),
        ({"model": register("plain", has_chat_template=False), "training_file": upload(client, chat)}, "training_file", "no chat template"),
    ]  # fmt: skip
    for options, param, words in cases:
        with pytest.raises(openai.BadRequestError, match=words) as refused:
            submit(**options)
        assert refused.value.param == param


def test_null_and_empty_options_are_accepted(submit: Submit, http: httpx.Client) -> None:
    job = submit()
    body: Json = {"model": job.model, "training_file": job.training_file, "integrations": []}
    body |= dict.fromkeys(("method", "metadata", "suffix", "seed", "validation_file"))
    answer = http.post("/v1/fine_tuning/jobs", json=body)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["integrations"], answer.json()["metadata"]) == ([], {})


@pytest.mark.parametrize(
    ("suffix", "part"),
    [
        ("My Support_Bot", "my-support-bot"),
        ("  Größe 2!", "grosse-2"),
        ("日本", ""),
        ("x" * 64, "x" * 64),
    ],
)
def test_a_suffix_is_normalised_and_echoed(submit: Submit, suffix: str, part: str) -> None:
    job = submit(suffix=suffix)
    assert spec_of(job).output_model.startswith(f"ds:tiny:{part}:")
    assert (job.model_extra or {})["user_provided_suffix"] == suffix


def test_adapters_are_an_extension(submit: Submit) -> None:
    job = submit(method={"type": "supervised", "supervised": {"lora": {"rank": 4}}})
    student = spec_of(job).distillation.student
    assert student.init == "lora"
    assert student.lora is not None
    assert student.lora.rank == 4
    assert job.to_dict()["method"]["supervised"]["lora"]["rank"] == 4  # type: ignore[index] # open JSON


def test_the_error_of_a_healthy_job_has_null_fields(submit: Submit) -> None:
    assert submit().to_dict()["error"] == {"code": None, "message": None, "param": None}


def test_jobs_are_selected_by_metadata_or_by_its_absence(
    client: openai.OpenAI, submit: Submit
) -> None:
    one, other = submit(metadata={"team": "x"}, seed=1), submit(seed=2)

    def listed(**query: str) -> list[str]:
        return [job.id for job in client.fine_tuning.jobs.list(extra_query=query)]

    assert listed(**{"metadata[team]": "x"}) == [one.id]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"team": "x"})] == [one.id]
    assert listed(metadata="null") == [other.id]
    assert listed() == [other.id, one.id]


@pytest.mark.parametrize(
    ("path", "name"),
    [("", "status"), ("", "metadata"), ("/{id}/events", "type"), ("/{id}/checkpoints", "step")],
)
def test_an_unknown_filter_is_refused(
    submit: Submit, http: httpx.Client, path: str, name: str
) -> None:
    job = submit()
    answer = http.get(f"/v1/fine_tuning/jobs{path.format(id=job.id)}", params={name: "x"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


def test_the_history_of_a_job_has_openais_messages(
    client: openai.OpenAI, submit: Submit, training_file: str, service: Service
) -> None:
    job = submit(validation_file=training_file)
    start(job)
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
    assert messages[::-1] == [
        f"Created fine-tuning job: {job.id}",
        f"Validating training file: {training_file} and validation file: {training_file}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
    ]


def test_rows_with_tools_need_a_template_that_renders_them(
    client: openai.OpenAI,
    submit: Submit,
    upload: Callable[..., str],
    register: Callable[..., str],
    tiny_llama_dir: Path,
    tmp_path: Path,
) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    row = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call]}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "topic": "x",
    }  # fmt: skip
    training = upload(client, [row])
    assert (client.files.retrieve(training).model_extra or {})["details"] == {
        "ignored_keys": {"topic": 1},
        "num_rows_with_tools": 1,
        "num_rows_with_tool_calls": 1,
    }
    with pytest.raises(openai.BadRequestError) as refused:
        submit(training_file=training)
    assert (refused.value.param, refused.value.code) == ("training_file", "tools_unsupported")
    folder = shutil.copytree(tiny_llama_dir, tmp_path / "with-tools")
    (folder / "chat_template.jinja").write_text("{{ tools }}{% for m in messages %}{{ m.tool_calls }}{% endfor %}")  # fmt: skip
    ref = store().put_folder(folder, "models/with-tools")
    with transaction() as session:
        session.execute(update(Model).where(Model.id == submit().model).values(store_key=ref.key))
    assert submit(training_file=training).status == "queued"
