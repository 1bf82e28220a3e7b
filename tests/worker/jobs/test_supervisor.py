"""A claimed job ends in exactly one way, and nothing of its run is left behind, whatever happens to the run."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import structlog

from app.contracts.messages import ArtifactRef, DistillationJob, ImportJob
from app.db import jobs, leases, models, reconciliation
from app.db.schema.tables import Job, Model
from app.db.session import engine, transaction
from app.services import garbage_collector
from app.settings import Settings, get_settings
from app.storage import store
from worker.jobs import lease_client
from worker.jobs.attempt import Attempt
from worker.jobs.lease_heartbeat import LeaseHeartbeat
from worker.jobs.run_process import child_environment
from worker.jobs.supervisor import free_ended, run_until_idle

PROJECT = "p"


@pytest.fixture(autouse=True)
def work(database: str, settings_env: Callable[..., Settings]) -> Settings:
    return settings_env(
        database_url=database,
        heartbeat_seconds=0.2,
        retry_backoff_seconds=0,
        num_threads=1,
        keep_checkpoints=2,
    )


@dataclass
class Watched:
    """A job while a supervisor works in a thread of its own."""

    job_id: str
    drain: threading.Event
    thread: threading.Thread

    def wait_for(
        self, is_true: Callable[[], Any], seconds: float = 240
    ) -> Any:  # Any: whatever was true
        deadline = time.monotonic() + seconds
        while not (found := is_true()):
            assert self.thread.is_alive(), f"the supervisor is through: {job(self.job_id).status}"
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.02)
        return found

    def run_process(self) -> psutil.Process:
        def find() -> psutil.Process | None:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it may end while we look
                    if f"/{self.job_id}/" in " ".join(process.cmdline()):
                        return process
            return None

        found = self.wait_for(find)
        assert isinstance(found, psutil.Process)
        return found

    def wait_for_checkpoint(self, number: int = 1) -> None:
        """Waits until this number of checkpoints is stored.

        Storing one may take seconds on a busy disk, in which a tiny model would be trained to the
        end. So the run is suspended from time to time once it has written one.
        """
        process = self.run_process()
        folder = get_settings().work_root() / self.job_id
        while len(checkpoint_steps(self.job_id)) < number:
            self.wait_for(lambda: any(folder.glob("*/out/step-*")))
            process.suspend()
            self._wait_until_stored(number, 2)  # not longer: it may not have been announced yet
            process.resume()
            time.sleep(0.05)

    def _wait_until_stored(self, number: int, seconds: float) -> None:
        until = time.monotonic() + seconds
        self.wait_for(
            lambda: len(checkpoint_steps(self.job_id)) >= number or time.monotonic() > until
        )


@contextmanager
def supervised(job_id: str) -> Iterator[Watched]:
    drain = threading.Event()
    thread = threading.Thread(target=run_until_idle, args=("test", drain.is_set), daemon=True)
    watched = Watched(job_id, drain, thread)
    thread.start()
    try:
        yield watched
    finally:
        thread.join(90)
    assert not thread.is_alive()


def job(job_id: str) -> Job:
    with transaction() as session:
        found = jobs.load_job(session, job_id)
        assert found is not None
        return found


def checkpoint_steps(job_id: str) -> list[int]:
    with transaction() as session:
        return [row.step for row in jobs.page_checkpoints(session, job_id)[0]]


def messages(job_id: str) -> str:
    with transaction() as session:
        return "\n".join(
            event.message for event in jobs.events_since(session, job_id, 0, limit=1000)
        )


def model_of(job_id: str) -> Model | None:
    with transaction() as session:
        return models.find_model(session, PROJECT, f"model-{job_id}")


def add_import(source: Path, job_id: str = "import-1") -> str:
    ref = store().put_folder(source, f"imports/{job_id}")
    spec = ImportJob(output_model=f"model-{job_id}", staged=ref, format="folder")
    with transaction() as session:
        jobs.insert_job(
            session,
            id=job_id,
            project_id=PROJECT,
            kind="import",
            model_id=spec.output_model,
            spec=spec.model_dump(mode="json"),
        )
    return job_id


def add_distillation(
    teacher: Path,
    tmp_path: Path,
    job_id: str = "ftjob-1",
    test_file: ArtifactRef | None = None,
    **hyperparameters: object,
) -> str:
    if not store().exists("models/teacher"):
        store().put_folder(teacher, "models/teacher")
        rows = tmp_path / "rows.jsonl"
        lines = [
            json.dumps(
                {
                    "prompt": f"What is the still number {i}?",
                    "completion": f"The jar of spirit {i * 7}.",
                }
            )
            for i in range(24)
        ]
        rows.write_text("\n".join(lines))
        store().put_file(rows, "files/rows")
    ref = ArtifactRef(key="models/teacher", bytes=1)
    block = {
        "teacher": "teacher",
        "student": {"init": "layers", "num_layers": 2},
        "hyperparameters": {
            "n_epochs": 8,
            "batch_tokens": 64,
            "eval_steps": 10_000,
            "checkpoint_steps": 4,
        }
        | hyperparameters,
        "evaluation": {"metrics": ["agreement"], "num_samples": 0},
    }
    spec = DistillationJob.model_validate(
        {
            "distillation": block,
            "teacher": ref,
            "start": ref,
            "training_file": ArtifactRef(key="files/rows", bytes=1),
            "test_file": test_file,
            "output_model": f"model-{job_id}",
            "seed": 3,
        }
    )
    with transaction() as session:
        jobs.insert_job(
            session,
            id=job_id,
            project_id=PROJECT,
            kind="distillation",
            model_id=spec.output_model,
            spec=spec.model_dump(mode="json"),
        )
    return job_id


def run_all() -> None:
    run_until_idle("test", lambda: False)


def wake_and_run_all() -> None:
    with transaction() as session:
        reconciliation.wake(session)
    run_all()


def weights_sha256(job_id: str) -> str:
    model = model_of(job_id)
    assert model is not None
    folder = store().fetch_folder(ArtifactRef(key=model.store_key, bytes=0), Path("unused"))
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def nothing_is_left(job_id: str) -> bool:
    left = psutil.Process().children(recursive=True)
    lines = [" ".join(p.cmdline()) for p in left if p.status() != "zombie"]
    folder = get_settings().work_root() / job_id
    return not any(job_id in line for line in lines) and not any(folder.glob("*"))


def test_an_import_registers_a_model_that_can_be_fetched(tiny_llama_dir: Path) -> None:
    job_id = add_import(tiny_llama_dir)
    assert run_until_idle("test", lambda: False) == 1
    done, model = job(job_id), model_of(job_id)
    assert (done.status, done.progress["percent"]) == ("succeeded", 100)
    assert model is not None
    assert (model.origin, model.facts["num_layers"], model.source_job_id) == ("imported", 4, job_id)
    assert store().verify_folder(model.store_key)
    assert nothing_is_left(job_id)
    assert not (get_settings().work_root() / job_id).exists()


def test_an_import_that_is_refused_fails_with_its_reason_and_leaves_no_model(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    job_id = add_import(folder)
    run_all()
    done = job(job_id)
    assert done.status == "failed"
    assert done.error is not None
    assert (done.error["code"], "pytorch_model.bin" in done.error["message"]) == (
        "unsafe_file",
        True,
    )
    assert (done.num_losses, model_of(job_id)) == (0, None)
    assert not store().exists(f"models/{job_id}")
    assert nothing_is_left(job_id)


def test_an_input_that_is_gone_fails_the_job_at_once(tiny_llama_dir: Path) -> None:
    job_id = add_import(tiny_llama_dir)
    store().delete(f"imports/{job_id}")
    run_all()
    done = job(job_id)
    assert (done.status, done.error and done.error["code"], done.attempt) == (
        "failed",
        "input_missing",
        1,
    )


def test_what_a_killed_worker_left_is_freed_once_its_job_has_ended(tiny_llama_dir: Path) -> None:
    ended, resting = (
        add_import(tiny_llama_dir, "import-ended"),
        add_import(tiny_llama_dir, "import-resting"),
    )
    with transaction() as session:
        jobs.request_cancel(session, ended)
        jobs.request_pause(session, resting)
    root = get_settings().work_root()
    for name in (ended, resting, "fetched"):
        (root / name / "1").mkdir(parents=True)
        (root / name / "1" / "spec.json").write_text("{}")
    run_all()
    assert {path.name for path in root.iterdir()} == {resting, "fetched"}


def test_inputs_fetched_from_a_remote_store_stay_within_their_budget(
    tiny_llama_dir: Path, settings_env: Callable[..., Settings]
) -> None:
    settings = settings_env(store_url="memory://supervisor", artifact_cache_bytes=1)
    for number in range(2):
        folder = Path(shutil.copytree(tiny_llama_dir, settings.data_dir / f"model-{number}"))
        (folder / "README.md").write_text(str(number))
        job_id = add_import(folder, f"import-{number}")
        run_all()
        assert job(job_id).status == "succeeded"
    assert len(list((settings.work_root() / "fetched").iterdir())) == 1


@pytest.mark.parametrize("name", [b".DS_Store", b"\xff\xfe"])
def test_a_strange_name_in_the_work_folder_stops_no_worker(
    tiny_llama_dir: Path, name: bytes
) -> None:
    job_id, root = add_import(tiny_llama_dir), get_settings().work_root()
    for folder in (root, root / job_id):
        folder.mkdir(parents=True, exist_ok=True)
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(b"strange")
    (root / job_id / "1²").mkdir()  # isdigit() holds for this name, and int() refuses it
    run_all()
    assert job(job_id).status == "succeeded"


def test_what_cannot_be_freed_is_told_and_stops_nothing(tiny_llama_dir: Path) -> None:
    ended = [add_import(tiny_llama_dir, f"import-{i}") for i in range(3)]
    root = get_settings().work_root()
    with transaction() as session:
        for job_id in ended:
            jobs.request_cancel(session, job_id)
            (root / job_id).mkdir(parents=True)
    (root / ended[1]).rmdir()
    (root / ended[1]).write_text("no folder")
    with structlog.testing.capture_logs() as events:
        run_all()
    assert [path.name for path in root.iterdir()] == [ended[1]]
    assert [event["job"] for event in events if event["event"] == "work_folder_stays"] == [ended[1]]


def test_a_worker_without_a_database_takes_nothing_and_lives_on(
    settings_env: Callable[..., Settings],
) -> None:
    settings = settings_env(database_url="postgresql://nobody@127.0.0.1:9/none")
    (settings.work_root() / "import-1").mkdir(parents=True)
    assert run_until_idle("test", lambda: False) == 0


def test_a_work_folder_that_cannot_be_made_is_a_loss_and_no_missing_input(
    tiny_llama_dir: Path, settings_env: Callable[..., Settings]
) -> None:
    job_id = add_import(tiny_llama_dir)
    # ENOENT, as if the folder were deleted while a checkpoint is written into it
    settings_env(work_dir="/proc/nowhere")
    run_all()
    assert (job(job_id).status, job(job_id).num_losses) == ("retry_wait", 1)


def test_a_worker_that_drains_claims_nothing(tiny_llama_dir: Path) -> None:
    job_id = add_import(tiny_llama_dir)
    assert run_until_idle("test", lambda: True) == 0
    assert job(job_id).status == "queued"


def test_a_distillation_leaves_a_model_metrics_stages_and_few_checkpoints(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    job_id = add_distillation(tiny_llama_dir, tmp_path)
    run_all()
    done, model = job(job_id), model_of(job_id)
    assert done.status == "succeeded", done.error
    assert model is not None
    assert (model.origin, model.facts["num_layers"], model.teacher_id) == (
        "distilled",
        2,
        "teacher",
    )
    assert done.trained_tokens
    with transaction() as session:
        names = {metric.name for metric in jobs.metric_series(session, job_id)}
    assert {"train_loss", "valid_kl"} <= names
    assert [stage["name"] for stage in done.stages][:1] == ["loading_models"]
    step_metrics, metrics = done.result_file_ids
    with store().open(f"files/{step_metrics}") as file:
        assert b"valid_kl" not in file.readline()
    with store().open(f"files/{metrics}") as file:
        assert b"valid_kl" in file.readline()
    steps = checkpoint_steps(job_id)
    assert 1 <= len(steps) <= 3
    stored = {f"step-{step}" for step in steps}
    (token,) = store().children(f"checkpoints/{job_id}")
    assert set(store().children(f"checkpoints/{job_id}/{token}")) == stored
    assert nothing_is_left(job_id)


def test_a_test_file_judges_the_student(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rows = tmp_path / "test.jsonl"
    rows.write_text('{"prompt": "Other?", "completion": "Yes."}\n' * 3)
    ref = store().put_file(rows, "files/test")
    job_id = add_distillation(tiny_llama_dir, tmp_path, test_file=ref, max_steps=1)
    run_all()
    result = job(job_id).result or {}
    assert (result["judged_on"], result["num_test_rows"]) == ("test", 3)


def test_a_killed_run_resumes_and_ends_with_the_weights_of_an_uninterrupted_one(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    calm = add_distillation(tiny_llama_dir, tmp_path, "ftjob-calm")
    run_all()
    killed = add_distillation(tiny_llama_dir, tmp_path, "ftjob-killed")
    merge = structlog.contextvars.merge_contextvars
    with structlog.testing.capture_logs([merge]) as lines, supervised(killed) as watched:
        watched.wait_for_checkpoint()
        watched.run_process().send_signal(signal.SIGKILL)
    assert (job(killed).status, job(killed).num_losses) == ("retry_wait", 1)
    assert "SIGKILL" in messages(killed)
    (death,) = [line for line in lines if line["event"] == "run_died"]
    assert (death["job"], death["attempt"]) == (killed, 1)
    wake_and_run_all()
    done = job(killed)
    assert (done.status, done.attempt) == ("succeeded", 2)
    assert "resumes from the checkpoint" in messages(killed)
    assert weights_sha256(killed) == weights_sha256(calm)


def flip_a_bit(stored: Path, job_id: str) -> None:
    path = stored / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def store_without_optimizer(stored: Path, job_id: str) -> None:
    """Replaces the newest checkpoint by one whose checksums match, but which lacks a file."""
    copy = shutil.copytree(stored, stored.with_name("incomplete"))
    (copy / "optimizer.safetensors").unlink()
    ref = store().put_folder(copy, "checkpoints/incomplete")
    with transaction() as session:
        newest = leases.newest_checkpoint(session, job_id)
        assert newest is not None
        assert ref.sha256 is not None
        newest.store_key, newest.manifest_sha256 = ref.key, ref.sha256


@pytest.mark.parametrize("damage", [flip_a_bit, store_without_optimizer])
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(
    damage: Callable[[Path, str], None], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    job_id = add_distillation(tiny_llama_dir, tmp_path)
    with supervised(job_id) as watched:
        watched.wait_for_checkpoint(2)
        watched.run_process().send_signal(signal.SIGKILL)
    with transaction() as session:
        newest = leases.newest_checkpoint(session, job_id)
        assert newest is not None
    damage(store().fetch_folder(ArtifactRef(key=newest.store_key, bytes=0), tmp_path), job_id)
    while job(job_id).status in ("running", "retry_wait", "queued"):
        wake_and_run_all()
    assert job(job_id).status == "succeeded", job(job_id).error
    _, then = messages(job_id).split(f"The checkpoint at step {newest.step} is damaged", 1)
    assert "resumes from the checkpoint at step" in then
    assert f"resumes from the checkpoint at step {newest.step}." not in then


def test_an_old_checkpoint_that_cannot_be_deleted_costs_the_run_nothing(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    job_id = add_distillation(
        tiny_llama_dir, tmp_path, n_epochs=1000, max_steps=1200, checkpoint_steps=200
    )
    with supervised(job_id) as watched:
        watched.wait_for(lambda: len(checkpoint_steps(job_id)) >= 2)
        with transaction() as session:
            keys = [row.store_key for row in jobs.page_checkpoints(session, job_id)[0]]
        for i, key in enumerate(keys):
            folder = store().fetch_folder(ArtifactRef(key=key, bytes=0), tmp_path)
            folder.symlink_to(folder.rename(tmp_path / f"moved-{i}"))  # rmtree refuses a link
    done = job(job_id)
    assert (done.status, done.attempt, done.num_losses) == ("succeeded", 1, 0)
    with transaction() as session:
        # the collector's from now on
        assert set(keys) <= {key for _, key in reconciliation.mark_unneeded_checkpoints(session)}


def test_a_cancelled_run_is_killed_and_leaves_no_model(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    job_id = add_distillation(tiny_llama_dir, tmp_path, n_epochs=1000)
    with supervised(job_id) as watched:
        process = watched.run_process()
        with transaction() as session:
            jobs.request_cancel(session, job_id)
        asked_at = time.monotonic()
    assert time.monotonic() - asked_at < 60
    assert (job(job_id).status, model_of(job_id), process.is_running()) == (
        "cancelled",
        None,
        False,
    )
    assert nothing_is_left(job_id)


def test_a_paused_run_rests_at_a_checkpoint_and_goes_on(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    job_id = add_distillation(
        tiny_llama_dir, tmp_path, n_epochs=1000, max_steps=1200, checkpoint_steps=10_000
    )
    with supervised(job_id) as watched:
        watched.wait_for(lambda: job(job_id).progress.get("step"))
        with transaction() as session:
            jobs.request_pause(session, job_id)
    paused = job(job_id)
    assert (paused.status, paused.num_losses, len(checkpoint_steps(job_id))) == ("paused", 0, 1)
    assert run_until_idle("test", lambda: False) == 0
    with transaction() as session:
        jobs.resume(session, job_id)
    run_all()
    assert (job(job_id).status, job(job_id).attempt) == ("succeeded", 2)


def test_a_run_without_disk_is_paused_with_its_checkpoints_and_can_be_resumed(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    job_id = add_distillation(
        tiny_llama_dir, tmp_path, n_epochs=1000, max_steps=600, checkpoint_steps=100
    )
    with supervised(job_id) as watched:
        watched.wait_for_checkpoint()
        process = watched.run_process()
        # the kernel refuses as it does on a full disk
        process.rlimit(psutil.RLIMIT_FSIZE, (4096, 4096))
    paused = job(job_id)
    assert (paused.status, paused.num_losses, paused.error) == ("paused", 0, None)
    assert "free some disk space, then resume" in messages(job_id)
    assert checkpoint_steps(job_id)
    with transaction() as session:
        jobs.resume(session, job_id)
    run_all()
    assert (job(job_id).status, job(job_id).attempt) == ("succeeded", 2)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_store_without_room_for_a_checkpoint_pauses_the_job(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(handle: int) -> None:
        raise OSError(number, "refused")

    job_id = add_distillation(
        tiny_llama_dir, tmp_path, n_epochs=1000, max_steps=600, checkpoint_steps=100
    )
    with supervised(job_id) as watched:
        watched.wait_for_checkpoint()
        monkeypatch.setattr("os.fsync", refuse)  # of this process, which only writes into the store
    monkeypatch.undo()
    paused = job(job_id)
    assert (paused.status, paused.num_losses, paused.error) == ("paused", 0, None)
    assert "no space for the checkpoint at step" in messages(job_id)
    assert "free some disk space, then resume" in messages(job_id)
    assert checkpoint_steps(job_id)
    assert nothing_is_left(job_id)


def test_a_worker_without_disk_counts_no_loss(tiny_llama_dir: Path, tmp_path: Path) -> None:
    job_id = add_distillation(tiny_llama_dir, tmp_path)
    lease = lease_client.claim("test")
    assert lease is not None
    attempt = Attempt(lease, LeaseHeartbeat(lease, beat_seconds=60), lambda: False, get_settings())
    attempt.give_up(OSError(errno.ENOSPC, "No space left on device"))
    assert (job(job_id).status, job(job_id).num_losses) == ("paused", 0)
    assert "free some disk" in messages(job_id)


def test_a_draining_worker_gives_the_job_back_without_a_loss(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    job_id = add_distillation(tiny_llama_dir, tmp_path, n_epochs=1000)
    with supervised(job_id) as watched:
        watched.wait_for(lambda: job(job_id).progress.get("step"))
        watched.drain.set()
    given_back = job(job_id)
    assert (given_back.status, given_back.num_losses, given_back.lease_token) == ("queued", 0, None)
    assert checkpoint_steps(job_id)
    assert nothing_is_left(job_id)


def test_a_supervisor_that_has_lost_its_lease_kills_the_run_and_writes_nothing(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    job_id = add_distillation(tiny_llama_dir, tmp_path, n_epochs=1000)
    with supervised(job_id) as watched:
        process = watched.run_process()
        with transaction() as session:
            row = jobs.load_job(session, job_id)
            assert row is not None
            assert row.lease_token is not None
            retry_policy = leases.RetryPolicy(max_losses=3, backoff_seconds=0)
            leases.lose(
                session,
                job_id,
                row.lease_token,
                retry_policy,
                reason="Expired.",
                error_code="worker_lost",
            )
        num_events = len(messages(job_id).splitlines())
    assert not process.is_running()
    assert (job(job_id).status, job(job_id).num_losses) == ("retry_wait", 1)
    assert len(messages(job_id).splitlines()) == num_events
    assert nothing_is_left(job_id)


def test_a_database_that_is_away_for_a_moment_costs_the_run_nothing(
    tiny_llama_dir: Path, tmp_path: Path, database: str, settings_env: Callable[..., Settings]
) -> None:
    job_id = add_distillation(
        tiny_llama_dir, tmp_path, n_epochs=1000, max_steps=1200, checkpoint_steps=100
    )
    pool = engine().pool
    with supervised(job_id) as watched:
        watched.wait_for_checkpoint()
        pid = watched.run_process().pid
        settings_env(database_url="postgresql://nobody@127.0.0.1:9/none")
        time.sleep(3)
        settings_env(database_url=database)
        assert watched.run_process().pid == pid
    pool.dispose()  # the supervisor may have returned a connection to it after the change
    done = job(job_id)
    assert (done.status, done.attempt, done.num_losses) == ("succeeded", 1, 0)
    with transaction() as session:
        steps = [
            metric.step for metric in jobs.metric_series(session, job_id, names=["train_loss"])
        ]
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    assert max(gaps) <= 2 * min(gaps)


def test_a_run_that_always_dies_fails_at_the_cap_and_harms_no_other(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    job_id = add_distillation(tiny_llama_dir, tmp_path, n_epochs=1000)
    for loss in range(1, 4):
        with supervised(job_id) as watched:
            watched.run_process().send_signal(signal.SIGKILL)
        assert job(job_id).num_losses == loss
        with transaction() as session:
            reconciliation.wake(session)
    done = job(job_id)
    assert (done.status, done.error and done.error["code"], done.attempt) == (
        "failed",
        "worker_lost",
        3,
    )
    other = add_import(tiny_llama_dir)
    run_all()
    assert job(other).status == "succeeded"


def test_a_job_that_failed_late_keeps_its_work_and_is_resumed_to_the_same_weights(
    tiny_llama_dir: Path, tmp_path: Path, settings_env: Callable[..., Settings]
) -> None:
    calm = add_distillation(tiny_llama_dir, tmp_path, "ftjob-calm")
    run_all()
    settings_env(max_losses=1)
    failing = add_distillation(tiny_llama_dir, tmp_path, "ftjob-failing")
    with supervised(failing) as watched:
        watched.wait_for_checkpoint()
        watched.run_process().send_signal(signal.SIGKILL)
    failed = job(failing)
    assert (failed.status, failed.num_losses) == ("failed", 1)
    assert failed.error is not None
    assert "is kept" in failed.error["message"]
    garbage_collector.collect(store())
    free_ended()
    steps = checkpoint_steps(failing)
    assert steps
    with transaction() as session:
        jobs.resume(session, failing)
    run_all()
    done = job(failing)
    assert (done.status, done.attempt, done.num_losses) == ("succeeded", 2, 0)
    assert f"resumes from the checkpoint at step {max(steps)}" in messages(failing)
    assert weights_sha256(failing) == weights_sha256(calm)


def test_a_run_over_the_time_limit_stops_at_a_checkpoint_and_goes_on_after_a_resume(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    job_id = add_distillation(
        tiny_llama_dir, tmp_path, n_epochs=1000, max_steps=1200, checkpoint_steps=10_000
    )
    with supervised(job_id) as watched:
        watched.wait_for(lambda: job(job_id).progress.get("step"))
        with transaction() as session:
            assert reconciliation.end_overdue(session, 0.0, 600.0) == 1
    paused = job(job_id)
    assert (paused.status, paused.error, len(checkpoint_steps(job_id))) == ("paused", None, 1)
    assert paused.pause_reason is not None
    assert "limit" in paused.pause_reason
    with transaction() as session:
        jobs.resume(session, job_id)
    run_all()
    assert (job(job_id).status, job(job_id).attempt) == ("succeeded", 2)


def test_a_run_gets_no_secret_and_no_network(
    monkeypatch: pytest.MonkeyPatch, work: Settings
) -> None:
    monkeypatch.setenv("STILLHOUSE_KEY_PEPPER", "pepper-canary")
    monkeypatch.setenv("STILLHOUSE_REDIS_URL", "redis://canary")
    monkeypatch.setenv("STILLHOUSE_HF_TOKEN", "token-canary")
    settings = Settings()
    staged = ImportJob(output_model="m", staged=ArtifactRef(key="k", bytes=1), format="folder")
    environment = child_environment(staged, settings)
    assert "canary" not in json.dumps(environment)
    assert settings.database_url not in environment.values()
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"  # see test_run_starter.py
    online = child_environment(ImportJob(output_model="m", hub="o/n@main", format="hub"), settings)
    assert (online["HF_HUB_OFFLINE"], online["STILLHOUSE_HF_TOKEN"]) == ("0", "token-canary")
    assert "pepper-canary" not in online.values()


def test_only_an_import_that_may_use_the_hub_token_gets_it(
    monkeypatch: pytest.MonkeyPatch, work: Settings
) -> None:
    monkeypatch.setenv("STILLHOUSE_HF_TOKEN", "token-canary")
    spec = ImportJob(output_model="m", hub="o/n@main", uses_hub_token=False, format="hub")
    environment = child_environment(spec, Settings())
    assert environment["HF_HUB_OFFLINE"] == "0"
    assert "token-canary" not in environment.values()
