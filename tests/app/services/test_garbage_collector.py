"""Garbage collection: a real Postgres, a real store, and what each row's end leaves in it."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text

from app.contracts.messages import ArtifactRef, JobFailure
from app.db import checkpoints, files, jobs, leases, models
from app.db.session import engine, transaction
from app.services.garbage_collector import collect
from app.settings import get_settings
from app.storage import StorageError, Store
from app.storage import store as make_store


@pytest.fixture
def store(database: str) -> Store:
    return make_store()


def add_job(job_id: str = "ftjob-1", **columns: Any) -> None:  # Any: columns of Job
    values = {"project_id": "p", "kind": "distillation", "spec": {}, "model_id": f"ds:{job_id}"}
    with transaction() as session:
        jobs.insert_job(session, id=job_id, **{**values, **columns})


def claim() -> tuple[str, int]:
    with transaction() as session:
        job = leases.claim(session, f"w{time.monotonic_ns()}", 60.0)
        assert job is not None
        assert job.lease_token is not None
        return job.id, job.lease_token


def change(statement: str) -> None:
    with transaction() as session:
        session.execute(text(statement))


def put_checkpoint(
    store: Store, folder: Path, job_id: str, token: int, step: int, *, commit: bool
) -> str:
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "model.safetensors").write_bytes(os.urandom(10))
    ref = store.put_folder(folder, f"checkpoints/{job_id}/{token}/step-{step}")
    if commit:
        with transaction() as session:
            assert checkpoints.insert_checkpoint(
                session, job_id, token, step=step, ref=ref, metrics={}, is_best=False
            )
    return ref.key


def test_checkpoints_of_lost_leases_are_collected_and_committed_ones_kept(
    store: Store, tmp_path: Path
) -> None:
    add_job()
    job_id, old = claim()
    kept = put_checkpoint(store, tmp_path / "c", job_id, old, 1, commit=True)
    orphan = put_checkpoint(store, tmp_path / "c", job_id, old, 2, commit=False)
    collect(store)
    assert store.exists(orphan), "the lease still stands: the row may be on its way"
    with transaction() as session:
        leases.release(session, job_id, old, reason="Drained.")
    _, new = claim()
    fresh = put_checkpoint(store, tmp_path / "c", job_id, new, 2, commit=False)
    assert collect(store) == 1
    assert [store.exists(key) for key in (kept, orphan, fresh)] == [True, False, True]


def fail(job_id: str, token: int) -> None:
    with transaction() as session:
        leases.fail(session, job_id, token, JobFailure(code="x", message="y"))


def test_a_cancelled_job_leaves_nothing_in_the_store(store: Store, tmp_path: Path) -> None:
    add_job()
    job_id, token = claim()
    put_checkpoint(store, tmp_path / "c", job_id, token, 1, commit=True)
    put_checkpoint(store, tmp_path / "c", job_id, token, 2, commit=False)
    store.put_folder(tmp_path / "c", f"models/{job_id}")
    with transaction() as session:
        leases.cancel(session, job_id, token)
    collect(store)
    assert store.children("checkpoints") == store.children("models") == []
    with transaction() as session:
        assert session.execute(text("SELECT count(*) FROM checkpoints")).scalar() == 0


def test_a_failed_job_keeps_its_checkpoints_until_it_is_deleted(
    store: Store, tmp_path: Path
) -> None:
    add_job()
    job_id, token = claim()
    kept = [
        put_checkpoint(store, tmp_path / "c", job_id, token, step, commit=True) for step in (1, 2)
    ]
    orphan = put_checkpoint(store, tmp_path / "c", job_id, token, 3, commit=False)
    unfinished = store.put_folder(tmp_path / "c", f"models/{job_id}/{token}")
    fail(job_id, token)
    for _ in range(2):
        collect(store)
        assert all(store.verify_folder(key) for key in kept)
        assert not store.exists(orphan)
        assert not store.exists(unfinished.key)
    with transaction() as session:
        assert jobs.delete_job(session, job_id)
        assert jobs.find_job(session, "p", job_id) is None
        assert jobs.page_jobs(session, "p") == ([], False)
    collect(store)
    assert store.children("checkpoints") == store.children("models") == []
    with transaction() as session:
        assert jobs.load_job(session, job_id), "a late writer's leavings must still be found"
    change("UPDATE jobs SET deleted_at = now() - interval '25 h'")
    collect(store)
    with transaction() as session:
        assert jobs.load_job(session, job_id) is None


def test_the_files_of_a_registered_model_outlive_the_deletion_of_its_job(
    store: Store, tmp_path: Path
) -> None:
    add_job()
    job_id, token = claim()
    put_checkpoint(store, tmp_path / "c", job_id, token, 1, commit=True)
    ref = store.put_folder(tmp_path / "c", f"models/{job_id}/{token}")
    succeed(job_id, token, ref)
    with transaction() as session:
        assert jobs.delete_job(session, job_id)
    collect(store)
    assert store.verify_folder(ref.key)
    assert store.children("checkpoints") == []


@pytest.mark.parametrize("num_statements", range(1, 17))
def test_a_job_that_succeeds_during_a_round_keeps_its_model(
    store: Store, tmp_path: Path, num_statements: int
) -> None:
    """The job succeeds after so many statements of the round, whatever they read."""
    add_job()
    job_id, token = claim()
    put_checkpoint(store, tmp_path / "c", job_id, token, 1, commit=True)
    ref = store.put_folder(tmp_path / "c", f"models/{job_id}/{token}")
    success = threading.Thread(target=succeed, args=(job_id, token, ref))
    collecting_thread, num_seen = threading.get_ident(), 0

    def count(*_: object) -> None:
        nonlocal num_seen
        if threading.get_ident() == collecting_thread:
            num_seen += 1
            if num_seen == num_statements:
                success.start()
                success.join(2)  # a lock of the round may hold it up

    event.listen(engine(), "after_cursor_execute", count)
    try:
        collect(store)
    finally:
        event.remove(engine(), "after_cursor_execute", count)
    if num_seen < num_statements:
        success.start()  # after the round
    success.join()
    with transaction() as session:
        job = jobs.load_job(session, job_id)
        assert job is not None
        assert job.status == "succeeded"
    assert store.verify_folder(ref.key)


def test_a_failed_import_leaves_no_folder(store: Store, tmp_path: Path) -> None:
    add_job("import-1", kind="import")
    job_id, token = claim()
    put_checkpoint(store, tmp_path / "c", "other", 1, 1, commit=False)
    store.put_folder(tmp_path / "c", f"models/{job_id}/{token}")
    fail(job_id, token)
    collect(store)
    assert store.children("models") == []


def test_what_a_resumed_attempt_writes_is_safe_from_a_round_that_saw_the_failure(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_job()
    job_id, old = claim()
    put_checkpoint(store, tmp_path / "c", job_id, old, 1, commit=True)
    orphan = store.put_folder(tmp_path / "c", f"models/{job_id}/{old}")
    fail(job_id, old)
    delete = store.delete
    written: list[str] = []

    def resume_before_deleting(key: str) -> None:
        if not written:
            with transaction() as session:
                assert jobs.resume(session, job_id)
            _, new = claim()
            written.append(store.put_folder(tmp_path / "c", f"models/{job_id}/{new}").key)
        delete(key)

    monkeypatch.setattr(store, "delete", resume_before_deleting)
    collect(store)
    assert not store.exists(orphan.key)
    assert store.verify_folder(written[0])


def test_checkpoints_of_a_job_that_failed_under_an_older_version_stay_if_they_are_still_committed(
    store: Store, tmp_path: Path
) -> None:
    add_job()
    job_id, token = claim()
    doomed, kept = (
        put_checkpoint(store, tmp_path / "c", job_id, token, step, commit=True) for step in (1, 2)
    )
    fail(job_id, token)
    change('UPDATE jobs SET error = \'{"code": "x", "message": "y"}\'')
    change("UPDATE checkpoints SET status = 'deleting' WHERE step = 1")
    collect(store)
    assert (store.exists(doomed), store.exists(kept)) == (False, True)
    with transaction() as session:
        assert jobs.resume(session, job_id)


def test_a_model_and_its_checkpoints_stay_until_it_is_deleted(store: Store, tmp_path: Path) -> None:
    add_job()
    job_id, token = claim()
    checkpoint = put_checkpoint(store, tmp_path / "c", job_id, token, 1, commit=True)
    ref = store.put_folder(tmp_path / "c", f"models/{job_id}")
    collect(store)
    assert store.verify_folder(ref.key), "a running job may be about to finish"
    succeed(job_id, token, ref)
    assert collect(store) == 0
    assert store.verify_folder(ref.key)
    assert store.verify_folder(checkpoint)
    with transaction() as session:
        assert models.delete_model(session, "p", "ds:small")
    collect(store)
    assert store.children("checkpoints") == store.children("models") == []


def test_what_a_zombie_left_beside_a_model_is_collected(store: Store, tmp_path: Path) -> None:
    add_job()
    job_id, token = claim()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes(b"weights")
    ref = store.put_folder(tmp_path / "m", f"models/{job_id}/{token}")
    zombie = store.put_folder(tmp_path / "m", f"models/{job_id}/{token - 1}")
    succeed(job_id, token, ref)
    assert collect(store) == 1
    assert (store.exists(ref.key), store.exists(zombie.key)) == (True, False)


def test_retired_checkpoints_are_collected_while_the_job_runs(store: Store, tmp_path: Path) -> None:
    add_job()
    job_id, token = claim()
    keys = [
        put_checkpoint(store, tmp_path / "c", job_id, token, step, commit=True)
        for step in (1, 2, 3)
    ]
    with transaction() as session:
        assert checkpoints.retire_checkpoints(session, job_id, 2) == keys[:1]
    assert collect(store) == 1
    assert [store.exists(key) for key in keys] == [False, True, True]


def test_an_upload_without_a_job_goes_after_a_day(store: Store, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in ("import-old", "import-new", "import-queued"):
        store.put_folder(tmp_path, f"imports/{name}")
    add_job("import-queued", kind="import", spec={"kind": "import", "staged": None})
    for name in ("import-old", "import-queued"):
        for path in (get_settings().data_dir / "store" / "imports" / name).iterdir():
            os.utime(path, (time.time() - 90_000,) * 2)
    collect(store)
    assert store.children("imports") == ["import-new", "import-queued"]


def test_staged_imports_go_when_their_job_has_ended(store: Store, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for name in ("a", "b", "unclaimed"):
        store.put_file(tmp_path / "model.gguf", f"imports/{name}/model.gguf")
    for name in ("a", "b"):
        spec = {"kind": "import", "staged": {"key": f"imports/{name}/model.gguf"}}
        add_job(name, kind="import", spec=spec)
    with transaction() as session:
        jobs.request_cancel(session, "a")
    assert collect(store) == 1
    assert store.children("imports") == ["b", "unclaimed"]


def test_expired_files_go_unless_a_job_reads_them(store: Store, tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b"{}")
    for name in ("free", "read", "young"):
        ref = store.put_file(tmp_path / "rows", f"files/{name}")
        with transaction() as session:
            files.insert_file(
                session,
                id=name,
                project_id="p",
                filename=name,
                purpose="fine-tune",
                bytes=2,
                sha256="",
                store_key=ref.key,
            )
    change("UPDATE files SET expires_at = now() - interval '1 s' WHERE id <> 'young'")
    add_job(training_file_id="read")
    assert collect(store) == 1
    assert store.children("files") == ["read", "young"]
    with transaction() as session:
        jobs.request_cancel(session, "ftjob-1")
    collect(store)
    assert store.children("files") == ["young"]


def test_an_upload_without_a_row_goes_after_a_day(store: Store, tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b"{}")
    for name in ("fresh", "stale"):
        store.put_file(tmp_path / "rows", f"files/{name}")
    stale = store.fetch_file(ArtifactRef(key="files/stale", bytes=2), tmp_path)
    os.utime(stale, (time.time() - 90_000, time.time() - 90_000))
    assert collect(store) == 1
    assert store.children("files") == ["fresh"]


def test_expired_idempotency_keys_go(store: Store) -> None:
    change(
        "INSERT INTO idempotency_keys (project_id, key, route, request_sha256, expires_at) VALUES "
        "('p', 'old', 'r', '', now() - interval '1 s'), ('p', 'new', 'r', '', now() + interval '1 h')"
    )
    collect(store)
    with engine().connect() as connection:
        assert connection.execute(text("SELECT key FROM idempotency_keys")).scalars().all() == [
            "new"
        ]


def test_what_cannot_be_deleted_keeps_nothing_else(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = []
    for number in range(2):
        (tmp_path / "f").write_bytes(b"x")
        keys.append(f"files/file-{number}")
        store.put_file(tmp_path / "f", keys[-1])
        os.utime(store.fetch_file(ArtifactRef(key=keys[-1], bytes=1), tmp_path), (0, 0))
    delete = store.delete

    def fail_once(key: str) -> None:
        if key == keys[0]:
            raise OSError("a file server keeps it")
        delete(key)

    monkeypatch.setattr(store, "delete", fail_once)
    collect(store)
    assert [store.exists(key) for key in keys] == [True, False]


ODD_NAMES = (b".DS_Store", b".nfs000000000012", b"with a blank", b"\xff\xfe")


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/{job}", "models", "files"])
def test_a_name_that_is_no_key_does_not_end_the_round(
    store: Store, tmp_path: Path, place: str
) -> None:
    add_job()
    job_id, token = claim()
    kept = put_checkpoint(store, tmp_path / "c", job_id, token, 1, commit=True)
    folder = Path(get_settings().store_root()) / place.format(job=job_id)
    folder.mkdir(exist_ok=True)
    for name in ODD_NAMES:
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(b"odd")
    stale = put_stale_file(store, tmp_path, "files/stale")
    assert collect(store) == 1
    assert [store.exists(key) for key in (kept, stale)] == [True, False]


def test_a_job_folder_that_cannot_be_listed_does_not_end_the_round(
    store: Store, tmp_path: Path
) -> None:
    folder = Path(get_settings().store_root()) / "checkpoints"
    folder.mkdir()
    (folder / "ftjob-loop").symlink_to(folder / "ftjob-loop")
    stale = put_stale_file(store, tmp_path, "files/stale")
    assert collect(store) == 1
    assert not store.exists(stale)


class ChangingStore(Store):
    """A store in which a file disappears right after its folder was listed."""

    def children(self, key: str) -> list[str]:
        names = super().children(key)
        if key == "files":
            self.delete(f"files/{names[0]}")
        return names


def test_a_file_deleted_after_it_was_listed_does_not_end_the_round(
    store: Store, tmp_path: Path
) -> None:
    keys = [put_stale_file(store, tmp_path, f"files/stale-{number}") for number in range(2)]
    assert collect(ChangingStore(get_settings().store_root())) == 1
    assert not any(store.exists(key) for key in keys)


class AbsentStore(Store):
    """A store that is down."""

    def children(self, key: str) -> list[str]:
        raise StorageError(f"cannot list {key}")


def test_old_events_go_while_the_store_is_down(store: Store) -> None:
    change(
        "INSERT INTO webhook_events (id, project_id, type, data, created_at) "
        "VALUES ('evt_1', 'p', 'batch.failed', '{}', now() - interval '31 days')"
    )
    with pytest.raises(StorageError):
        collect(AbsentStore(get_settings().store_root()))
    with transaction() as session:
        assert session.scalar(text("SELECT count(*) FROM webhook_events")) == 0


def put_stale_file(store: Store, tmp_path: Path, key: str) -> str:
    """Stores an old file that no row refers to."""
    (tmp_path / "stale").write_bytes(b"x")
    store.put_file(tmp_path / "stale", key)
    os.utime(store.fetch_file(ArtifactRef(key=key, bytes=1), tmp_path), (0, 0))
    return key


def succeed(job_id: str, token: int, ref: ArtifactRef) -> None:
    model = {"id": "ds:small", "origin": "distilled", "store_key": ref.key, "bytes": ref.bytes}
    with transaction() as session:
        done = leases.succeed(
            session,
            job_id,
            token,
            model={**model, "manifest_sha256": ref.sha256, "facts": {}},
            result={},
            trained_tokens=1,
        )
        assert done is not None
        assert done.status == "succeeded"
