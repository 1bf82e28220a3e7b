import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from sqlalchemy import text

from app.contracts.messages import SPLIT_VERSION, ArtifactRef, DistillationJob, JobFailure
from app.db import checkpoints, leases
from app.db import jobs as job_rows
from app.db.schema.tables import File
from app.db.session import transaction
from app.services.submission import TEST_FILE
from app.settings import Settings, get_settings
from app.storage import store

Rows = list[dict[str, Any]]
ROWS: Rows = [{"prompt": f"What is {n}?", "completion": "A number."} for n in range(3)]
PROMPTS: Rows = [{"prompt": f"What is {n}?"} for n in range(3)]
CHAT: Rows = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
]


class Bench:
    """A project with a model, ready to submit jobs."""

    def __init__(
        self, client: openai.OpenAI, upload: Callable[..., str], register: Callable[..., str]
    ) -> None:
        self.client, self._upload, self.register = client, upload, register
        self.model = register()

    def upload(self, rows: Rows = ROWS, **options: Any) -> str:
        return self._upload(self.client, rows, **options)

    def submit(self, block: dict[str, Any] | None = None, **options: Any) -> FineTuningJob:
        method: Any = {
            "type": "distillation",
            "distillation": {"teacher": self.model, **(block or {})},
        }
        body: dict[str, Any] = {"model": self.model, "method": method, **options}
        if "training_file" not in body:
            body["training_file"] = self.upload()
        return self.client.fine_tuning.jobs.create(**body)

    def refused(self, block: dict[str, Any] | None = None, **options: Any) -> openai.APIStatusError:
        with pytest.raises(openai.APIStatusError) as refused:
            self.submit(block, **options)
        assert self.client.fine_tuning.jobs.list().data == []
        return refused.value


@pytest.fixture
def bench(client: openai.OpenAI, upload: Callable[..., str], register: Callable[..., str]) -> Bench:
    return Bench(client, upload, register)


def claim(job_id: str) -> int:
    with transaction() as session:
        job = leases.claim(session, f"worker/{time.monotonic()}", 90.0)
        assert job is not None
        assert job.id == job_id
        assert job.lease_token is not None
        return job.lease_token


def test_a_job_is_queued_with_what_was_left_open_decided(bench: Bench) -> None:
    job = bench.submit(suffix="support", metadata={"team": "x"}, seed=7)
    extra = job.model_extra or {}
    assert (job.object, job.status, job.seed, job.metadata) == (
        "fine_tuning.job",
        "queued",
        7,
        {"team": "x"},
    )
    assert (job.model, extra["teacher"], extra["queue"]) == (
        "tiny",
        "tiny",
        {"position": 1, "depth": 1},
    )
    assert job.fine_tuned_model is None
    assert job.hyperparameters.n_epochs == 3
    block = (job.method.model_extra or {})["distillation"] if job.method else {}
    assert block["student"]["init"] == "layers"
    assert block["data"]["completions"] == "dataset"
    with transaction() as session:
        row = job_rows.load_job(session, job.id)
    assert row is not None
    assert re.fullmatch(r"ds:tiny:support:[0-9a-f]{8}", row.model_id)
    assert bench.client.fine_tuning.jobs.retrieve(job.id) == job


def test_prompts_alone_are_answered_by_the_teacher(bench: Bench) -> None:
    job = bench.submit(training_file=bench.upload(PROMPTS))
    assert job.to_dict()["method"]["distillation"]["data"]["completions"] == "teacher"  # type: ignore[index] # open JSON


def test_another_start_than_the_teacher_is_a_checkpoint_with_a_free_head(bench: Bench) -> None:
    job = bench.submit(model=bench.register("small", num_layers=2))
    student = job.to_dict()["method"]["distillation"]["student"]  # type: ignore[index] # open JSON
    assert (student["init"], student["freeze_head"]) == ("checkpoint", False)


def test_the_openai_place_for_epochs_is_honoured(bench: Bench) -> None:
    assert bench.submit(hyperparameters={"n_epochs": 5}).hyperparameters.n_epochs == 5


@pytest.mark.parametrize(
    ("block", "options", "status", "code", "param"),
    [
        ({"teacher": "gone"}, {}, 404, "model_not_found", "method.distillation.teacher"),
        ({}, {"model": "gone"}, 404, "model_not_found", "model"),
        ({}, {"model": "a\x00b"}, 400, "invalid_value", "model"),
        ({"teacher": "a\x00b"}, {}, 404, "model_not_found", "method.distillation.teacher"),
        ({}, {"training_file": "file-gone"}, 404, "resource_not_found", "training_file"),
        ({}, {"validation_file": "file-gone"}, 404, "resource_not_found", "validation_file"),
        (
            {"evaluation": {"test_file": "file-gone"}},
            {},
            404,
            "resource_not_found",
            "method.distillation.evaluation.test_file",
        ),
        (
            {"student": {"num_layers": 5}},
            {},
            400,
            "invalid_value",
            "method.distillation.student.num_layers",
        ),
        (
            {"student": {"layers": [0, 4]}},
            {},
            400,
            "invalid_value",
            "method.distillation.student.layers",
        ),
        ({"student": {"layers": [1, 0]}}, {}, 400, "invalid_value", "method.distillation.student"),
        (
            {"student": {"layers": [0], "layer_choice": "measured"}},
            {},
            400,
            "invalid_value",
            "method.distillation.student",
        ),
        (
            {"student": {"init": "checkpoint", "fit_rows": 9}},
            {},
            400,
            "invalid_value",
            "method.distillation.student",
        ),
        ({"studnt": {}}, {}, 400, "unknown_parameter", "method.distillation.studnt"),
        (
            {"hyperparameters": {"learning_rate": 2}},
            {},
            400,
            "invalid_value",
            "method.distillation.hyperparameters.learning_rate",
        ),
        (
            {"objective": {"divergence": "wasserstein"}},
            {},
            400,
            "invalid_value",
            "method.distillation.objective.divergence",
        ),
        ({}, {"suffix": ""}, 400, "invalid_value", "suffix"),
        ({}, {"suffix": "s" * 65}, 400, "invalid_value", "suffix"),
        ({}, {"seed": -1}, 400, "invalid_value", "seed"),
        ({}, {"metadata": {"a": "b" * 513}}, 400, "invalid_value", "metadata.a"),
        ({}, {"metadata": {str(n): "b" for n in range(17)}}, 400, "invalid_value", "metadata"),
        (
            {},
            {"hyperparameters": {"batch_size": 257}},
            400,
            "invalid_value",
            "hyperparameters.batch_size",
        ),
        ({}, {"extra_body": {"colour": "red"}}, 400, "unknown_parameter", "colour"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    bench: Bench, block: dict[str, Any], options: dict[str, Any], status: int, code: str, param: str
) -> None:
    error = bench.refused(block, **options)
    assert (error.status_code, error.code, error.param) == (status, code, param)


def test_a_value_that_is_not_allowed_is_answered_with_those_that_are(bench: Bench) -> None:
    message = bench.refused({"hyperparameters": {"batch_tokens": "many"}}).message
    assert "method.distillation.hyperparameters.batch_tokens" in message
    assert "'auto'" in message
    assert (
        "'forward_kl', 'reverse_kl', 'jsd'"
        in bench.refused({"objective": {"divergence": "wasserstein"}}).message
    )


def test_different_tokenizers_are_no_longer_compared_token_by_token(bench: Bench) -> None:
    other = bench.register("other", tokenizer_sha256="o" * 64)  # and the same width of vocabulary
    error = bench.refused({"objective": {"teacher_signal": "logits"}}, model=other)
    assert (error.code, error.param) == (
        "tokenizer_mismatch",
        "method.distillation.objective.teacher_signal",
    )
    assert "uld or text" in error.message
    block = (bench.submit(model=other).method.model_extra or {})["distillation"]  # type: ignore[union-attr] # given
    assert (block["student"]["init"], block["objective"]["teacher_signal"]) == ("checkpoint", "uld")


@pytest.mark.parametrize(
    ("keys", "completions"), [(("input", "target"), "dataset"), (("input",), "teacher")]
)
def test_rows_of_input_and_target_are_prompts_and_completions(
    bench: Bench, keys: tuple[str, ...], completions: str
) -> None:
    file_id = bench.upload([dict.fromkeys(keys, f"number {n}") for n in range(3)])
    assert (bench.client.files.retrieve(file_id).model_extra or {})["format"] == "_".join(keys)
    job = bench.submit(training_file=file_id)
    assert job.to_dict()["method"]["distillation"]["data"]["completions"] == completions  # type: ignore[index] # open


def test_a_masked_teacher_is_refused_or_settled_before_anything_is_queued(bench: Bench) -> None:
    bert = bench.register("bert", architecture="bert", family="masked", has_chat_template=False)
    student = {"init": "fresh", "config": {"family": "encoder-decoder"}}
    logits = {"teacher": bert, "student": student, "objective": {"teacher_signal": "logits"}}
    error = bench.refused(logits, model=bert)
    assert (error.status_code, error.code) == (400, "invalid_value")
    assert error.param == "method.distillation.objective.teacher_signal"
    assert "use objective.teacher_signal = conditional_mlm or hidden" in error.message
    job = bench.submit({"teacher": bert, "student": student}, model=bert)
    block = (job.method.model_extra or {})["distillation"] if job.method else {}
    assert block["objective"]["teacher_signal"] == "conditional_mlm"
    assert (block["student"]["freeze_head"], block["student"]["freeze_encoder"]) == (False, False)
    with transaction() as session:
        row = job_rows.load_job(session, job.id)
    assert row is not None
    assert row.spec["distillation"]["objective"]["teacher_signal"] == "conditional_mlm"


def test_a_fresh_student_has_room_for_every_token_of_the_teachers_tokenizer(bench: Bench) -> None:
    config = {"family": "gpt2", "vocab_size": 383}
    error = bench.refused({"student": {"init": "fresh", "config": config}})
    assert error.param == "method.distillation.student.config.vocab_size"
    enough = {"init": "fresh", "config": config | {"vocab_size": 384}}
    assert bench.submit({"student": enough}).status == "queued"


@pytest.mark.parametrize(("max_positions", "fits"), [(16, False), (64, True)])
def test_a_fresh_students_positions_bound_its_rows(
    bench: Bench, max_positions: int, fits: bool
) -> None:
    student = {"init": "fresh", "config": {"family": "gpt2", "max_positions": max_positions}}
    rows = bench.upload([{"prompt": "zq" * 10, "completion": "yes"}])
    if fits:
        assert bench.submit({"student": student}, training_file=rows).status == "queued"
    else:
        assert (
            bench.refused({"student": student}, training_file=rows).code
            == "context_length_exceeded"
        )


def test_completions_from_a_file_that_has_none_are_refused(bench: Bench) -> None:
    error = bench.refused({"data": {"completions": "dataset"}}, training_file=bench.upload(PROMPTS))
    assert error.param == "method.distillation.data.completions"


def test_a_file_for_another_purpose_is_refused(bench: Bench) -> None:
    error = bench.refused(training_file=bench.upload(purpose="evals"))
    assert (error.code, error.param) == ("invalid_file", "training_file")


def test_a_validation_file_of_another_format_is_refused(bench: Bench) -> None:
    assert bench.refused(validation_file=bench.upload(CHAT)).param == "validation_file"
    assert bench.refused(validation_file=bench.upload(PROMPTS)).param == "validation_file"


def test_held_out_rows_may_have_answers_if_the_training_rows_have_none(bench: Bench) -> None:
    too_long = bench.upload([{"prompt": "Other?", "completion": "zq" * 200}])
    error = bench.refused(training_file=bench.upload(PROMPTS), validation_file=too_long)
    assert (error.code, error.param) == ("context_length_exceeded", "validation_file")
    held_out = bench.upload([{"prompt": "Other?", "completion": "yes"}])
    test = bench.upload([{"prompt": "Third?", "completion": "no"}])
    job = bench.submit(
        {"evaluation": {"test_file": test}},
        training_file=bench.upload(PROMPTS),
        validation_file=held_out,
    )
    assert job.status == "queued"


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        (CHAT, "invalid_value"),  # another format
        (ROWS, "invalid_value"),  # the training file itself
        ([{"prompt": "zq" * 200, "completion": "yes"}], "context_length_exceeded"),
    ],
)
def test_a_test_file_that_does_not_fit_is_refused(bench: Bench, rows: list[Any], code: str) -> None:
    error = bench.refused({"evaluation": {"test_file": bench.upload(rows)}})
    assert (error.code, error.param) == (code, "method.distillation.evaluation.test_file")


def test_a_test_file_of_another_project_is_refused(
    bench: Bench, stranger: openai.OpenAI, upload: Callable[..., str]
) -> None:
    block = {"evaluation": {"test_file": upload(stranger, PROMPTS)}}
    assert bench.refused(block).param == "method.distillation.evaluation.test_file"


def test_a_test_file_is_kept_for_its_job(bench: Bench) -> None:
    test_file = bench.upload([{"prompt": "Other?", "completion": "yes"}])
    job = bench.submit({"evaluation": {"test_file": test_file}})
    with pytest.raises(openai.ConflictError):
        bench.client.files.delete(test_file)
    with transaction() as session:
        row = job_rows.load_job(session, job.id)
    assert row is not None
    spec = DistillationJob.model_validate(row.spec)
    assert spec.test_file is not None
    assert spec.test_file.key == f"files/{test_file}"
    assert spec.split_version == SPLIT_VERSION
    block = job.to_dict()["method"]["distillation"]  # type: ignore[index] # open JSON
    assert block["evaluation"]["test_file"] == test_file


def test_a_row_longer_than_the_context_is_refused_with_its_line(bench: Bench) -> None:
    long = [*ROWS, {"prompt": "zq" * 200, "completion": "yes"}]
    error = bench.refused(training_file=bench.upload(long))
    assert (error.code, error.param) == ("context_length_exceeded", "training_file")
    assert "line 4 has" in error.message


def test_a_file_whose_content_is_gone_is_refused(bench: Bench) -> None:
    file_id = bench.upload([{"prompt": "lantern " * 40, "completion": "yes"}])
    with transaction() as session:
        row = session.get(File, file_id)
        assert row is not None
        store().delete(row.store_key)
    error = bench.refused(training_file=file_id)
    assert (error.code, error.param) == ("invalid_file", "training_file")
    assert "upload it again" in error.message


def test_a_row_of_many_bytes_that_fits_in_tokens_is_taken(bench: Bench) -> None:
    roomy = [{"prompt": "lantern " * 40, "completion": "yes"}]  # 320 bytes, fewer than 256 tokens
    assert bench.submit(training_file=bench.upload(roomy)).status == "queued"


def test_too_little_disk_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    file_id = bench.upload()
    monkeypatch.setenv("STILLHOUSE_MIN_FREE_BYTES", str(2**60))
    get_settings.cache_clear()
    error = bench.refused(training_file=file_id)
    assert (error.status_code, error.code) == (400, "insufficient_storage")


def test_a_project_has_a_bounded_number_of_jobs_under_way(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLHOUSE_MAX_ACTIVE_JOBS_PER_PROJECT", "1")
    get_settings.cache_clear()
    first = bench.submit()
    with pytest.raises(openai.RateLimitError) as refused:
        bench.submit()
    assert refused.value.code == "insufficient_quota"
    assert int(refused.value.response.headers["retry-after"]) <= 120
    bench.client.fine_tuning.jobs.cancel(first.id)
    assert bench.submit().status == "queued"


def test_the_same_key_and_body_give_the_same_job(bench: Bench) -> None:
    options: dict[str, Any] = {
        "training_file": bench.upload(),
        "extra_headers": {"Idempotency-Key": "run-42"},
    }
    first, second = bench.submit(**options), bench.submit(**options)
    assert first == second
    assert [job.id for job in bench.client.fine_tuning.jobs.list()] == [first.id]
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        bench.submit(**{**options, "seed": 1})
    assert refused.value.code == "idempotency_key_reused"


def test_a_key_replays_even_when_the_file_is_gone(bench: Bench) -> None:
    options: dict[str, Any] = {
        "training_file": bench.upload(),
        "extra_headers": {"Idempotency-Key": "run-42"},
    }
    first = bench.submit(**options)
    bench.client.fine_tuning.jobs.cancel(first.id)
    bench.client.files.delete(options["training_file"])
    assert bench.submit(**options).id == first.id


def test_a_refused_request_leaves_its_key_free(bench: Bench) -> None:
    options: dict[str, Any] = {
        "training_file": bench.upload(),
        "extra_headers": {"Idempotency-Key": "run-42"},
    }
    bench.refused({"teacher": "gone"}, **options)
    assert bench.submit(**options).status == "queued"


def test_many_at_once_with_one_key_make_one_job(bench: Bench) -> None:
    options: dict[str, Any] = {
        "training_file": bench.upload(),
        "extra_headers": {"Idempotency-Key": "run-42"},
    }
    with ThreadPoolExecutor(8) as pool:
        ids = {job.id for job in pool.map(lambda _: bench.submit(**options), range(8))}
    assert len(ids) == 1
    assert len(bench.client.fine_tuning.jobs.list().data) == 1


def test_the_sdks_own_retry_gives_the_job_that_was_made(bench: Bench) -> None:
    options: dict[str, Any] = {"training_file": bench.upload()}
    first = bench.submit(**options)
    again = bench.submit(**options, extra_headers={"x-stainless-retry-count": "1"})
    assert again.id == first.id
    assert bench.submit(**options).id != first.id


def test_jobs_are_listed_in_pages_and_by_metadata(bench: Bench) -> None:
    file_id = bench.upload()
    ids = [bench.submit(training_file=file_id, metadata={"n": str(n % 2)}).id for n in range(3)]
    listed = bench.client.fine_tuning.jobs.list(limit=2)
    assert [job.id for job in listed.data] == ids[:0:-1]
    assert [job.id for job in listed] == ids[::-1]
    assert [job.id for job in bench.client.fine_tuning.jobs.list(metadata={"n": "1"})] == [ids[1]]
    with pytest.raises(openai.BadRequestError) as refused:
        bench.client.fine_tuning.jobs.list(after="ftjob-gone")
    assert refused.value.param == "after"


def test_a_waiting_job_is_cancelled_at_once_and_stays_so(bench: Bench) -> None:
    job = bench.submit()
    assert bench.client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.ConflictError) as refused:
        bench.client.fine_tuning.jobs.resume(job.id)
    assert refused.value.code == "invalid_state_transition"
    assert refused.value.response.headers["x-should-retry"] == "false"


def test_a_running_job_is_asked_to_stop(bench: Bench) -> None:
    job = bench.submit()
    claim(job.id)
    asked = bench.client.fine_tuning.jobs.cancel(job.id)
    assert asked.status == "running"
    assert (asked.model_extra or {})["cancel_requested_at"] is not None


def test_a_job_is_paused_and_resumed(bench: Bench) -> None:
    job = bench.submit()
    assert bench.client.fine_tuning.jobs.pause(job.id).to_dict()["status"] == "paused"
    assert bench.client.fine_tuning.jobs.resume(job.id).status == "queued"


def test_a_failed_job_says_why(bench: Bench) -> None:
    job = bench.submit()
    token = claim(job.id)
    with transaction() as session:
        leases.fail(
            session, job.id, token, JobFailure(code="nan_loss", message="lower the learning rate")
        )
    error = bench.client.fine_tuning.jobs.retrieve(job.id).error
    assert error is not None
    assert (error.code, error.message) == ("nan_loss", "lower the learning rate")


def fail_late(job_id: str, code: str = "out_of_memory") -> None:
    """Fails the job after its first checkpoint."""
    token = claim(job_id)
    ref = ArtifactRef(key=f"checkpoints/{job_id}/{token}/step-10", bytes=5, sha256="c" * 64)
    with transaction() as session:
        checkpoints.insert_checkpoint(
            session, job_id, token, step=10, ref=ref, metrics={}, is_best=True
        )
        leases.fail(session, job_id, token, JobFailure(code=code, message="the memory is full"))


def test_a_job_that_failed_after_a_checkpoint_can_be_resumed(bench: Bench) -> None:
    job = bench.submit()
    fail_late(job.id)
    error = bench.client.fine_tuning.jobs.retrieve(job.id).error
    assert error is not None
    assert f"POST /v1/fine_tuning/jobs/{job.id}/resume" in error.message
    resumed = bench.client.fine_tuning.jobs.resume(job.id)
    assert (resumed.status, resumed.finished_at) == ("queued", None)
    assert resumed.error is not None
    assert resumed.error.code is None
    with pytest.raises(openai.ConflictError):
        bench.client.files.delete(job.training_file)


def test_a_job_that_failed_before_its_first_checkpoint_is_not_resumed(bench: Bench) -> None:
    job = bench.submit()
    token = claim(job.id)
    with transaction() as session:
        leases.fail(
            session, job.id, token, JobFailure(code="nan_loss", message="lower the learning rate")
        )
    with pytest.raises(openai.ConflictError, match="submit it again") as refused:
        bench.client.fine_tuning.jobs.resume(job.id)
    assert refused.value.code == "invalid_state_transition"


def test_a_failed_job_whose_inputs_were_deleted_is_not_resumed(bench: Bench) -> None:
    test_file = bench.upload([{"prompt": "Other?", "completion": "yes"}])
    of_file, of_model = bench.submit(), bench.submit(model=bench.register("small", num_layers=2))
    of_test = bench.submit({"evaluation": {"test_file": test_file}})
    for job in (of_file, of_model, of_test):
        fail_late(job.id)
    bench.client.files.delete(of_file.training_file)
    bench.client.files.delete(test_file)
    bench.client.models.delete("small")
    named = ((of_file, "training_file"), (of_model, "model"), (of_test, TEST_FILE))
    for job, param in named:
        with pytest.raises(openai.ConflictError, match="submit a new job") as refused:
            bench.client.fine_tuning.jobs.resume(job.id)
        assert (refused.value.code, refused.value.param) == ("input_missing", param)
        assert bench.client.fine_tuning.jobs.retrieve(job.id).status == "failed"


def test_a_resumed_failure_counts_against_the_quota(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = bench.submit()
    fail_late(job.id)
    monkeypatch.setenv("STILLHOUSE_MAX_ACTIVE_JOBS_PER_PROJECT", "1")
    get_settings.cache_clear()
    bench.submit()
    with pytest.raises(openai.RateLimitError) as refused:
        bench.client.fine_tuning.jobs.resume(job.id)
    assert refused.value.code == "insufficient_quota"


def test_a_job_that_has_ended_can_be_deleted_with_its_checkpoints(
    bench: Bench, http: httpx.Client
) -> None:
    job = bench.submit()
    url = f"/v1/fine_tuning/jobs/{job.id}"
    refused = http.delete(url)
    assert (refused.status_code, refused.json()["error"]["code"]) == (
        409,
        "invalid_state_transition",
    )
    assert "cancel it first" in refused.json()["error"]["message"]
    fail_late(job.id)
    with pytest.raises(openai.ConflictError, match="delete the job"):
        bench.client.fine_tuning.jobs.cancel(job.id)
    assert http.delete(url).json() == {"id": job.id, "object": "fine_tuning.job", "deleted": True}
    assert [http.get(url).status_code, http.delete(url).status_code] == [404, 404]
    assert bench.client.fine_tuning.jobs.list().data == []
    with transaction() as session:
        assert job_rows.page_checkpoints(session, job.id) == ([], False)
        assert job_rows.resume(session, job.id) is None


def test_a_job_is_deleted_after_its_model(bench: Bench, http: httpx.Client) -> None:
    job = bench.submit()
    token = claim(job.id)
    model = {"id": "ds:tiny", "origin": "distilled", "store_key": f"models/{job.id}", "bytes": 1}
    with transaction() as session:
        model |= {"manifest_sha256": "", "facts": {}}
        assert leases.succeed(session, job.id, token, model=model, result={}, trained_tokens=1)
    refused = http.delete(f"/v1/fine_tuning/jobs/{job.id}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "resource_in_use")
    bench.client.models.delete("ds:tiny")
    assert http.delete(f"/v1/fine_tuning/jobs/{job.id}").status_code == 200


def test_a_job_that_succeeds_while_it_is_deleted_keeps_its_model(
    bench: Bench, http: httpx.Client
) -> None:
    job = bench.submit()
    token = claim(job.id)
    model = {"id": "ds:tiny", "origin": "distilled", "store_key": f"models/{job.id}", "bytes": 1}
    model |= {"manifest_sha256": "", "facts": {}}
    with ThreadPoolExecutor(1) as pool:
        with transaction() as session:
            assert leases.succeed(session, job.id, token, model=model, result={}, trained_tokens=1)
            answer = pool.submit(http.delete, f"/v1/fine_tuning/jobs/{job.id}")
            time.sleep(0.5)  # the request waits for the row that this transaction holds
            assert not answer.done()
        assert answer.result().json()["error"]["code"] == "resource_in_use"
    assert http.get(f"/v1/fine_tuning/jobs/{job.id}").json()["status"] == "succeeded"


@pytest.mark.parametrize(
    ("code", "is_resumable"), [("out_of_memory", True), ("gate_failed", False)]
)
def test_a_failure_that_a_resume_meets_again_does_not_advise_it(
    bench: Bench, code: str, is_resumable: bool
) -> None:
    job = bench.submit()
    fail_late(job.id, code)
    error = bench.client.fine_tuning.jobs.retrieve(job.id).error
    assert error is not None
    assert ("/resume" in error.message, "DELETE" in error.message) == (is_resumable, True)


def test_a_job_whose_specification_cannot_be_read_is_not_resumed(bench: Bench) -> None:
    job = bench.submit()
    fail_late(job.id)
    with transaction() as session:
        session.execute(text("UPDATE jobs SET spec = '{}'"))
    with pytest.raises(openai.ConflictError, match="submit a new job") as refused:
        bench.client.fine_tuning.jobs.resume(job.id)
    assert refused.value.code == "invalid_spec"


def test_a_paused_job_says_why(bench: Bench) -> None:
    job = bench.submit()
    token = claim(job.id)
    with transaction() as session:
        leases.pause_for_disk(session, job.id, token, message="The job is paused: the disk is full")
    paused = bench.client.fine_tuning.jobs.retrieve(job.id).to_dict()
    assert (paused["status"], paused["pause_reason"]) == ("paused", "the disk is full")
    assert bench.client.fine_tuning.jobs.resume(job.id).to_dict()["pause_reason"] is None


def test_a_file_of_a_waiting_job_cannot_be_deleted(bench: Bench) -> None:
    job = bench.submit()
    with pytest.raises(openai.ConflictError) as refused:
        bench.client.files.delete(job.training_file)
    assert refused.value.code == "resource_in_use"
    assert job.id in refused.value.message
    bench.client.fine_tuning.jobs.cancel(job.id)
    assert bench.client.files.delete(job.training_file).deleted is True


def test_events_are_listed_newest_first_in_pages(bench: Bench) -> None:
    job = bench.submit()
    bench.client.fine_tuning.jobs.pause(job.id)
    bench.client.fine_tuning.jobs.resume(job.id)
    page = bench.client.fine_tuning.jobs.list_events(job.id, limit=2)
    rows = [event.to_dict() for event in page]
    data = [row["data"] for row in rows if row["type"] == "state"]
    assert data == [{"status": name} for name in ("queued", "paused", "queued")]
    oldest = [event.message for event in page][:-4:-1]
    assert oldest == [
        f"Created fine-tuning job: {job.id}",
        f"Validating training file: {job.training_file}",
        "Files validated, moving job to queued state",
    ]
    assert len(page.data) == 2
    assert page.data[0].object == "fine_tuning.job.event"


def follow(client: openai.OpenAI, job_id: str, **params: str) -> Iterator[FineTuningJobEvent]:
    return iter(
        client.get(
            f"/fine_tuning/jobs/{job_id}/events",
            cast_to=FineTuningJobEvent,
            stream=True,
            stream_cls=openai.Stream[FineTuningJobEvent],
            options={"params": {"stream": "true", **params}},
        )
    )


def test_events_stream_until_the_job_has_ended(bench: Bench) -> None:
    job = bench.submit()
    events = follow(bench.client, job.id)
    first = [next(events) for _ in range(3)][-1]
    assert first.to_dict()["type"] == "state"
    threading.Timer(0.3, bench.client.fine_tuning.jobs.cancel, [job.id]).start()
    rest = list(events)
    assert [(event.data or {}) for event in rest][-1] == {"status": "cancelled"}
    assert [event.id for event in follow(bench.client, job.id, after=first.id)] == [
        event.id for event in rest
    ]


def test_a_quiet_stream_is_kept_alive_in_a_way_the_sdk_can_read(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.api.sse.PING_SECONDS", 0.5)
    job = bench.submit()
    threading.Timer(1.6, bench.client.fine_tuning.jobs.cancel, [job.id]).start()
    with bench.client.fine_tuning.jobs.with_streaming_response.list_events(
        job.id, extra_headers={"accept": "text/event-stream"}
    ) as answer:
        raw = b"".join(answer.iter_bytes())
    assert b": ping\n" in raw
    assert b"\nid:" not in raw
    assert raw.endswith(b"data: [DONE]\n\n")
    assert len(list(follow(bench.client, job.id))) == 4


def test_a_stream_outlives_an_outage_of_the_database(
    bench: Bench, database: str, settings_env: Callable[..., Settings]
) -> None:
    job = bench.submit()
    events = follow(bench.client, job.id)
    first = next(events)
    settings_env(database_url="postgresql://nobody@127.0.0.1:1/none")
    time.sleep(0.8)
    settings_env(database_url=database)
    bench.client.fine_tuning.jobs.cancel(job.id)
    data = [event.to_dict()["data"] for event in (first, *events)]
    assert data == [{}, {}, {"status": "queued"}, {"status": "cancelled"}]


def test_a_job_is_taken_while_redis_is_away(
    bench: Bench, settings_env: Callable[..., Settings]
) -> None:
    settings_env(redis_url="redis://127.0.0.1:1/0")
    began = time.monotonic()
    assert bench.submit().status == "queued"
    assert time.monotonic() - began < 30


def test_metrics_come_as_series(bench: Bench, http: httpx.Client) -> None:
    job = bench.submit()
    claim(job.id)
    with transaction() as session:
        for step in (1, 2, 3):
            leases.write_metrics(
                session, job.id, step, {"train_loss": 1.0 / step, "learning_rate": 0.1}
            )
    url = f"/v1/fine_tuning/jobs/{job.id}/metrics"
    assert [series["name"] for series in http.get(url).json()["data"]] == [
        "learning_rate",
        "train_loss",
    ]
    chosen = http.get(url, params={"names": "train_loss", "from_step": 2, "to_step": 2}).json()
    assert chosen["data"] == [{"name": "train_loss", "points": [{"step": 2, "value": 0.5}]}]


def insert_checkpoint(job_id: str, token: int, step: int) -> None:
    with transaction() as session:
        checkpoints.insert_checkpoint(
            session,
            job_id,
            token,
            step=step,
            ref=ArtifactRef(key=f"checkpoints/a/1/step-{step}", bytes=5, sha256="c" * 64),
            metrics={"valid_loss": 2.0, "valid_agreement": 0.5},
            is_best=True,
        )


def test_checkpoints_are_listed_in_the_order_asked_for(bench: Bench, http: httpx.Client) -> None:
    job = bench.submit()
    token = claim(job.id)
    for step in (10, 20, 30):
        insert_checkpoint(job.id, token, step)
    steps = {}
    for order in ("asc", "desc"):
        page = http.get(f"/v1/fine_tuning/jobs/{job.id}/checkpoints", params={"order": order})
        steps[order] = [row["step_number"] for row in page.json()["data"]]
    assert steps == {"asc": [10, 20, 30], "desc": [30, 20, 10]}


def test_checkpoints_are_listed_under_names_that_can_be_served(bench: Bench) -> None:
    job = bench.submit()
    insert_checkpoint(job.id, claim(job.id), 10)
    (checkpoint,) = bench.client.fine_tuning.jobs.checkpoints.list(job.id)
    assert (checkpoint.object, checkpoint.step_number, checkpoint.fine_tuning_job_id) == (
        "fine_tuning.job.checkpoint",
        10,
        job.id,
    )
    assert re.fullmatch(
        r"ds:tiny::[0-9a-f]{8}:ckpt-step-10", checkpoint.fine_tuned_model_checkpoint
    )
    assert checkpoint.metrics.valid_loss == checkpoint.metrics.full_valid_loss == 2.0
    assert checkpoint.metrics.full_valid_mean_token_accuracy == 0.5


def test_another_projects_job_does_not_exist(bench: Bench, stranger: openai.OpenAI) -> None:
    job = bench.submit()
    touches: list[Callable[[str], object]] = [
        stranger.fine_tuning.jobs.retrieve,
        stranger.fine_tuning.jobs.cancel,
        stranger.fine_tuning.jobs.pause,
        stranger.fine_tuning.jobs.resume,
        lambda job_id: stranger.delete(f"/fine_tuning/jobs/{job_id}", cast_to=httpx.Response),
        stranger.fine_tuning.jobs.list_events,
        stranger.fine_tuning.jobs.checkpoints.list,
        lambda job_id: list(follow(stranger, job_id)),
        lambda job_id: stranger.get(f"/fine_tuning/jobs/{job_id}/metrics", cast_to=httpx.Response),
    ]
    for touch in touches:
        with pytest.raises(openai.NotFoundError):
            touch(job.id)
    assert stranger.fine_tuning.jobs.list().data == []
    assert bench.client.fine_tuning.jobs.retrieve(job.id).status == "queued"


def test_another_projects_file_and_model_cannot_be_used(
    bench: Bench, stranger: openai.OpenAI, upload: Callable[..., str]
) -> None:
    foreign_file = upload(stranger, ROWS)
    foreign_model = bench.register("theirs", project_id="rival")
    assert bench.refused(training_file=foreign_file).status_code == 404
    assert bench.refused({"teacher": foreign_model}).status_code == 404
