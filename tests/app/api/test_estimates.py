"""POST /v1/fine_tuning/jobs/estimate, and the refusal of jobs that cannot fit."""

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import redis

from app.contracts.job_seconds import PHASES, REFERENCE_FLOPS, VERSION
from app.contracts.train_workers import MachineProfile, TrainWorkerStatus, train_worker_key
from app.db.schema.tables import Job
from app.db.session import transaction
from app.services.row_lengths import ESTIMATES, MAX_PROJECT_CHECKS
from app.settings import Settings
from tests.app.api.conftest import PROJECT
from worker.models.model_facts import model_facts

Json = dict[str, Any]  # Any: JSON bodies of the public API
ROUTE = "/v1/fine_tuning/jobs/estimate"
GIB = 2**30
CPU = MachineProfile(device="cpu", flops=REFERENCE_FLOPS, has_bfloat16=True)
ROWS = [
    {"prompt": f"Who keeps number {i}?", "completion": f"The student keeps {i}."} for i in range(20)
]


class Bench:
    """A project with a model and a file, and train workers whose heartbeats it sends."""

    def __init__(self, http: httpx.Client, valkey_url: str, model: str, file_id: str) -> None:
        self.http, self.model, self.file_id = http, model, file_id
        self._redis = redis.Redis.from_url(valkey_url)

    def body(self, block: Mapping[str, Any] | None = None, **options: Any) -> Json:
        method = {"type": "distillation", "distillation": {"teacher": self.model, **(block or {})}}
        return {"model": self.model, "training_file": self.file_id, "method": method, **options}

    def estimate(self, body: Json) -> Json:
        answer = self.http.post(ROUTE, json=body)
        assert answer.status_code == 200, answer.text
        found: Json = answer.json()
        return found

    def refused(self, route: str, body: Json) -> Json:
        answer = self.http.post(route, json=body)
        assert answer.status_code == 400, answer.text
        error: Json = answer.json()["error"]
        return error

    def beat(self, name: str = "w", **changes: Any) -> None:
        status = {
            "worker_id": name,
            "memory_bytes": 64 * GIB,
            "beat_at": time.time(),
            **changes,
        }
        value = TrainWorkerStatus.model_validate(status).model_dump_json()
        self._redis.set(train_worker_key(name), value, ex=60)


@pytest.fixture
def bench(
    http: httpx.Client,
    client: openai.OpenAI,
    upload: Callable[..., str],
    register: Callable[..., str],
    valkey: str,
    tiny_llama_dir: Path,
) -> Bench:
    model = register(**dict(model_facts(tiny_llama_dir)))
    return Bench(http, valkey, model, upload(client, ROWS))


def test_an_estimate_counts_and_stores_nothing(bench: Bench, client: openai.OpenAI) -> None:
    found = bench.estimate(bench.body())
    assert (found["object"], found["num_rows"], found["num_epochs"]) == (
        "fine_tuning.job.estimate",
        18,
        3,
    )
    assert found["num_steps"] >= 3
    assert found["num_tokens"] > 3 * 18
    assert found["peak_memory_bytes"] > 2**28
    assert found["disk_bytes"] > 2**20
    assert (found["fits"], found["seconds"]) == (True, None)
    assert (found["workers"], found["queue"]) == ({"alive": 0, "busy": 0}, {"jobs_before": 0})
    assert any("No train worker is alive" in note for note in found["notes"])
    assert client.fine_tuning.jobs.list().data == []


def test_the_queue_and_the_workers_are_counted(bench: Bench) -> None:
    job = bench.http.post("/v1/fine_tuning/jobs", json=bench.body())
    assert job.status_code == 200, job.text
    bench.beat("one", job_id="ftjob-x")
    bench.beat("two")
    found = bench.estimate(bench.body())
    assert (found["workers"], found["queue"]) == ({"alive": 2, "busy": 1}, {"jobs_before": 1})


def test_the_time_comes_from_a_matmul_and_then_from_finished_jobs(bench: Bench) -> None:
    bench.beat(profile=CPU)
    reference = bench.estimate(bench.body())["seconds"]
    assert set(reference) == {*PHASES, "total"}
    assert reference["total"] == pytest.approx(sum(reference[name] for name in PHASES), abs=0.5)
    job_id = bench.http.post("/v1/fine_tuning/jobs", json=bench.body()).json()["id"]
    cost = {
        "version": VERSION,
        "device": "cpu",
        "has_bfloat16": True,
        "seconds": dict.fromkeys(PHASES, 20.0),
        "reference_seconds": dict.fromkeys(PHASES, 10.0),
    }
    with transaction() as session:
        job = session.get(Job, job_id)
        assert job is not None
        job.status, job.attempt, job.result = "succeeded", 1, {"cost": cost}
        job.started_at = job.finished_at = job.created_at
    twice = bench.estimate(bench.body())
    assert twice["seconds"]["training"] == pytest.approx(2 * reference["training"], abs=0.2)
    assert any("measured phases of 1 finished job" in note for note in twice["notes"])
    with transaction() as session:  # the times of a quantised teacher say nothing about others
        job = session.get(Job, job_id)
        assert job is not None
        block = {**job.spec["distillation"], "teacher_precision": "int8"}
        job.spec = {**job.spec, "distillation": block}
    assert bench.estimate(bench.body())["seconds"] == reference


@pytest.mark.parametrize(
    "changes",
    [
        {"training_file": "file-none"},
        {"method": {"type": "distillation", "distillation": {"teacher": "tiny", "student": {"num_layers": 9}}}},
        {"method": {"type": "dpo"}},
        {"hyperparameters": {"n_epochs": 0}},
        {"unknown": 1},
    ],
    ids=["file", "layers", "method", "epochs", "unknown"],
)  # fmt: skip
def test_a_body_is_refused_as_for_a_new_job(bench: Bench, changes: Json) -> None:
    answers = [
        bench.http.post(route, json=bench.body() | changes)
        for route in (ROUTE, "/v1/fine_tuning/jobs")
    ]
    assert answers[0].status_code in (400, 404)
    assert answers[0].json() == answers[1].json()


def test_supervised_jobs_and_ladders_are_estimated(bench: Bench) -> None:
    supervised = {"model": bench.model, "training_file": bench.file_id}
    adapters = {"type": "supervised", "supervised": {"lora": {"rank": 4}}}
    whole, lora = (bench.estimate(supervised | more) for more in ({}, {"method": adapters}))
    assert lora["disk_bytes"] < whole["disk_bytes"]
    one, ladder = (
        bench.estimate(bench.body({"student": {"num_layers": size}})) for size in (2, [1, 2])
    )
    assert ladder["num_steps"] == 2 * one["num_steps"]
    assert ladder["num_tokens"] == 2 * one["num_tokens"]


def test_a_job_that_no_worker_can_hold_is_refused(bench: Bench) -> None:
    body = bench.body()
    bench.beat("small", profile=CPU)
    needed = bench.estimate(body)["peak_memory_bytes"]
    bench.beat("small", memory_bytes=needed // 2, profile=CPU)
    found = bench.estimate(body)
    assert found["fits"] is False
    assert any("which is too little" in note for note in found["notes"])
    error = bench.refused("/v1/fine_tuning/jobs", body)
    assert error["code"] == "insufficient_memory"
    assert "use a smaller model or a worker with more memory" in error["message"]
    bench.beat("large", memory_bytes=2 * needed, profile=CPU)
    found = bench.estimate(body)
    assert found["fits"] is True
    assert any("1 of the 2 workers that are alive have too little" in n for n in found["notes"])
    assert bench.http.post("/v1/fine_tuning/jobs", json=body).status_code == 200


def test_the_memory_of_a_gpu_decides_if_there_is_one(bench: Bench) -> None:
    card = MachineProfile(device="cuda", flops=1e14, has_bfloat16=True, memory_bytes=2**18)
    bench.beat(profile=card)
    error = bench.refused("/v1/fine_tuning/jobs", bench.body())
    assert error["code"] == "insufficient_memory"
    assert "the largest worker has 0.0 GiB" in error["message"]
    needed = bench.estimate(bench.body())["peak_memory_bytes"]
    bench.beat(profile=card.model_copy(update={"memory_bytes": needed - 1}))
    assert bench.estimate(bench.body())["fits"] is False  # with the usual chunks of the loss
    assert bench.http.post("/v1/fine_tuning/jobs", json=bench.body()).status_code == 200


def test_a_job_that_asks_for_more_devices_than_any_worker_has_is_refused(bench: Bench) -> None:
    card = MachineProfile(device="cuda", flops=1e14, has_bfloat16=True, memory_bytes=GIB)
    body = bench.body({"hyperparameters": {"num_devices": 2}})
    bench.beat("small", profile=card, num_devices=1)
    error = bench.refused("/v1/fine_tuning/jobs", body)
    assert (error["code"], error["param"]) == ("too_few_devices", "hyperparameters.num_devices")
    assert bench.estimate(body)["fits"] is False
    bench.beat("large", profile=card, num_devices=2)
    found = bench.estimate(body)
    assert found["fits"] is True
    assert any("1 of the 2 workers that are alive have too few CUDA" in n for n in found["notes"])
    assert any("the 2 devices divide the work on a batch equally" in n for n in found["notes"])


def test_a_precision_of_the_teacher_that_no_worker_supports_is_refused(bench: Bench) -> None:
    body = bench.body({"teacher_precision": "fp8"})
    bench.beat("without", profile=CPU, teacher_precisions=["int8", "int4"])
    error = bench.refused("/v1/fine_tuning/jobs", body)
    assert (error["code"], error["param"]) == (
        "unsupported_precision",
        "method.distillation.teacher_precision",
    )
    assert "torchao" in error["message"]
    assert "compute capability 8.9" in error["message"]
    assert bench.estimate(body)["fits"] is False
    card = MachineProfile(device="cuda", flops=1e14, has_bfloat16=True, memory_bytes=GIB)
    bench.beat("with", profile=card, teacher_precisions=["int8", "int4", "fp8"])
    found = bench.estimate(body)
    assert found["fits"] is True
    assert any("1 of the 2 workers that are alive cannot quantise" in n for n in found["notes"])
    assert any("a teacher that is not quantised" in n for n in found["notes"])
    assert bench.http.post("/v1/fine_tuning/jobs", json=body).status_code == 200


def test_a_worker_without_a_profile_refuses_nothing(bench: Bench) -> None:
    bench.beat(memory_bytes=1)
    assert bench.estimate(bench.body())["fits"] is True
    assert bench.http.post("/v1/fine_tuning/jobs", json=bench.body()).status_code == 200


@pytest.mark.parametrize(
    "config", ["[]", "{", '{"decoder": "x"}', '{"num_attention_heads": 1e999}']
)
def test_a_damaged_config_gives_a_guess_with_its_reason(
    bench: Bench, register: Callable[..., str], tiny_llama_dir: Path, tmp_path: Path, config: str
) -> None:
    folder = shutil.copytree(tiny_llama_dir, tmp_path / "damaged")
    (folder / "config.json").write_text(config)
    bench.model = register("damaged", folder=folder, **dict(model_facts(tiny_llama_dir)))
    found = bench.estimate(bench.body())
    assert found["peak_memory_bytes"] > 2**28
    notes = [note for note in found["notes"] if "are a guess, because its config.json" in note]
    assert len(notes) == 2  # of the model and of the teacher


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "a model of the job has no tokenizer.json"), ("{}", "tokenizer.json of a model of")],
    ids=["missing", "damaged"],
)
def test_an_unreadable_tokenizer_is_told_with_what_to_do(
    bench: Bench,
    register: Callable[..., str],
    tiny_llama_dir: Path,
    tmp_path: Path,
    content: str | None,
    message: str,
) -> None:
    folder = shutil.copytree(tiny_llama_dir, tmp_path / "damaged")
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    bench.model = register("damaged", folder=folder, **dict(model_facts(tiny_llama_dir)))
    error = bench.refused(ROUTE, bench.body())
    assert (error["code"], error["param"]) == ("invalid_model", "model")
    assert message in error["message"]
    assert "import or upload the model again" in error["message"]


def test_estimates_take_no_place_of_submissions(bench: Bench) -> None:
    with ExitStack() as estimates:
        for _ in range(MAX_PROJECT_CHECKS):
            estimates.enter_context(ESTIMATES.one_more(PROJECT))
        assert bench.http.post(ROUTE, json=bench.body()).status_code == 429
        assert bench.http.post("/v1/fine_tuning/jobs", json=bench.body()).status_code == 200


def test_a_disk_that_is_too_small_is_told(
    bench: Bench, settings_env: Callable[..., Settings]
) -> None:
    settings_env(min_free_bytes=2**60)
    found = bench.estimate(bench.body())
    assert found["fits"] is False
    assert any("disk has too little free space" in note for note in found["notes"])


def test_without_redis_the_workers_are_unknown_and_the_job_is_accepted(
    bench: Bench, settings_env: Callable[..., Settings]
) -> None:
    settings_env(redis_url="redis://127.0.0.1:1")
    found = bench.estimate(bench.body())
    assert found["fits"] is True
    assert any("Redis did not answer" in note for note in found["notes"])


def test_a_key_without_the_scope_gets_no_estimate(
    bench: Bench, service: Any, http: httpx.Client
) -> None:
    key = service.new_key(scopes=("jobs:read",))
    answer = http.post(ROUTE, json=bench.body(), headers={"authorization": f"Bearer {key}"})
    assert answer.status_code == 403
