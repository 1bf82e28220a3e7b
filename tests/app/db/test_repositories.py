"""Keys, files, models, aliases and idempotency keys."""

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import func, text

from app.contracts.messages import ArtifactRef, JobStatus
from app.db import checkpoints, files, idempotency, jobs, keys, leases, models, reconciliation
from app.db.job_states import move
from app.db.registry import aliases
from app.db.schema.tables import File, Job, Model
from app.db.session import Session, transaction

AddJob = Callable[..., Job]


def add_file(session: Session, file_id: str, **columns: Any) -> File:  # Any: columns of File
    values = {
        "project_id": "p",
        "filename": "f",
        "purpose": "fine-tune",
        "bytes": 1,
        "sha256": "0" * 64,
    }
    return files.insert_file(
        session, id=file_id, store_key=f"files/{file_id}", **{**values, **columns}
    )


def add_model(
    session: Session, model_id: str, **columns: Any
) -> Model | None:  # Any: columns of Model
    values = {
        "project_id": "p",
        "origin": "imported",
        "bytes": 1,
        "manifest_sha256": "0" * 64,
        "facts": {},
    }
    return models.insert_model(
        session, id=model_id, store_key=f"models/{model_id}", **{**values, **columns}
    )


def test_a_revoked_key_stays_revoked(session: Session) -> None:
    keys.insert_key(session, id="k", project_id="p", secret_hmac=b"x", scopes=["inference"])
    assert keys.revoke_key(session, "k")
    first = session.scalar(text("SELECT revoked_at FROM api_keys"))
    assert keys.revoke_key(session, "k")
    assert session.scalar(text("SELECT revoked_at FROM api_keys")) == first
    assert not keys.revoke_key(session, "unknown")
    session.commit()
    assert keys.read_key("k") == keys.KeyFacts("p", b"x", ["inference"], None, first)
    assert keys.read_key("unknown") is None


def test_files_belong_to_their_project(session: Session) -> None:
    add_file(session, "mine")
    add_file(session, "theirs", project_id="other")
    assert files.find_file(session, "p", "theirs") is None
    assert not files.delete_file(session, "p", "theirs")
    assert [row.id for row in files.page_files(session, "p")[0]] == ["mine"]
    assert files.count_files(session, "p")[0] == 1
    assert files.delete_file(session, "p", "mine")
    assert files.find_file(session, "p", "mine") is None


def test_an_expired_file_is_gone(session: Session) -> None:
    add_file(session, "old", expires_at=func.now() - timedelta(seconds=1))
    add_file(session, "new", expires_at=func.now() + timedelta(hours=1))
    assert files.find_file(session, "p", "old") is None
    assert [row.id for row in files.page_files(session, "p", purpose="fine-tune")[0]] == ["new"]
    assert files.page_files(session, "p", purpose="batch") == ([], False)


def test_a_file_is_in_use_until_its_jobs_have_ended(session: Session, add_job: AddJob) -> None:
    add_job("trains", training_file_id="f")
    add_job("validates", validation_file_id="f")
    add_job("tests", test_file_id="f")
    assert files.readers_of_file(session, "p", "f") == ["tests", "trains", "validates"]
    move(session, "trains", JobStatus.cancelled, message="x")
    assert files.readers_of_file(session, "p", "f") == ["tests", "validates"]


@pytest.mark.parametrize("column", ["training_file_id", "validation_file_id", "test_file_id"])
def test_an_expired_file_is_kept_until_its_job_has_ended(
    session: Session, add_job: AddJob, column: str
) -> None:
    add_file(session, "f", expires_at=func.now() - timedelta(seconds=1))
    add_job("reads", **{column: "f"})
    assert reconciliation.forget_expired_files(session) == []
    move(session, "reads", JobStatus.cancelled, message="x")
    assert len(reconciliation.forget_expired_files(session)) == 1


def test_a_model_id_is_taken_once(session: Session, add_job: AddJob) -> None:
    assert add_model(session, "m")
    assert add_model(session, "m", project_id="other") is None
    add_job("importing", model_id="coming")
    assert models.is_name_taken(session, "m")
    assert models.is_name_taken(session, "coming")
    assert not models.is_name_taken(session, "free")


def test_a_project_sees_its_own_models_and_the_shared_ones(session: Session) -> None:
    add_model(session, "mine")
    add_model(session, "theirs", project_id="other")
    add_model(session, "shared", project_id=None)
    assert {row.id for row in models.list_models(session, "p")} == {"mine", "shared"}
    assert models.find_model(session, "p", "shared")
    assert models.find_model(session, "p", "theirs") is None
    assert not models.delete_model(session, "p", "theirs")
    assert not models.delete_model(session, "p", "shared")
    assert not models.delete_model(session, None, "mine")
    assert models.delete_model(session, "p", "mine")
    assert models.find_model(session, "p", "mine") is None


def test_an_alias_moves(session: Session) -> None:
    for name in ("m1", "m2"):
        add_model(session, name)
        aliases.point_alias(session, "p", "support@live", model_id=name, key_id="k")
    alias = models.find_alias(session, "p", "support@live")
    assert alias is not None
    assert alias.model_id == "m2"
    assert models.find_alias(session, "other", "support@live") is None
    assert models.aliases_of_models(session, "p") == {"m2": ["support@live"]}
    aliases.drop_alias(session, alias, key_id="k")
    assert models.find_alias(session, "p", "support@live") is None


def test_a_model_is_in_use_by_aliases_and_jobs(session: Session, add_job: AddJob) -> None:
    model = add_model(session, "m")
    assert model is not None
    assert models.users_of_model(session, model) == []
    aliases.point_alias(session, "p", "a@live", model_id="m", key_id="k")
    add_job("as-teacher", spec={"teacher": {"key": "models/m"}, "start": {"key": "x"}})
    add_job("as-start", spec={"teacher": {"key": "x"}, "start": {"key": "models/m"}})
    add_job("over", spec={"teacher": {"key": "models/m"}, "start": {"key": "models/m"}})
    move(session, "over", JobStatus.cancelled, message="x")
    assert models.users_of_model(session, model) == ["a@live", "as-start", "as-teacher"]


def test_a_model_is_in_use_by_jobs_that_read_a_checkpoint_of_its_training(
    session: Session, add_job: AddJob
) -> None:
    add_job("trained")
    move(session, "trained", JobStatus.cancelled, message="x")
    model = add_model(session, "m", source_job_id="trained")
    assert model is not None
    own, other = "checkpoints/trained/7/step-5/model", "checkpoints/trained-2/7/step-5/model"
    add_job("as-teacher", spec={"teacher": {"key": own}, "start": {"key": other}})
    add_job("as-start", spec={"teacher": {"key": other}, "start": {"key": own}})
    add_job("beside", spec={"teacher": {"key": other}, "start": {"key": other}})
    assert models.users_of_model(session, model) == ["as-start", "as-teacher"]


def test_a_model_is_in_use_by_the_checkpoints_of_a_lora_job_that_has_ended(
    session: Session, add_job: AddJob
) -> None:
    model = add_model(session, "m")
    assert model is not None
    spec: dict[str, Any] = {"start": {"key": "models/m", "bytes": 900}, "teacher": {"key": "x"}}
    add_job("ftjob-1", spec=spec | {"distillation": {"student": {"init": "lora"}}})
    job = leases.claim(session, "w", 60)
    assert job is not None
    assert job.lease_token is not None
    ref = ArtifactRef(key="k", bytes=5, sha256="c" * 64)
    checkpoints.insert_checkpoint(
        session, job.id, job.lease_token, step=5, ref=ref, metrics={}, is_best=True
    )
    checkpoint = models.find_checkpoint(session, "p", job.model_id, 5)
    assert checkpoint is not None
    assert models.start_bytes_of_adapters(session, checkpoint) == 900
    move(session, "ftjob-1", JobStatus.cancelled, message="x")
    assert models.users_of_model(session, model) == ["ftjob-1 (for its checkpoints)"]
    session.execute(text("UPDATE checkpoints SET status = 'deleting'"))
    assert models.users_of_model(session, model) == []


def test_deleting_a_model_dooms_its_checkpoints(session: Session, add_job: AddJob) -> None:
    add_job("ftjob-1")
    job = leases.claim(session, "w", 60)
    assert job is not None
    assert job.lease_token is not None
    session.execute(
        text(
            "INSERT INTO checkpoints (id, job_id, lease_token, step, store_key, bytes, manifest_sha256)"
            f" VALUES ('c', 'ftjob-1', {job.lease_token}, 5, 'k', 1, '')"
        )
    )
    assert models.find_checkpoint(session, "p", job.model_id, 5)
    assert models.find_checkpoint(session, "p", job.model_id, 6) is None
    assert models.find_checkpoint(session, "other", job.model_id, 5) is None
    add_model(session, job.model_id, source_job_id="ftjob-1")
    assert models.delete_model(session, "p", job.model_id)
    assert models.find_checkpoint(session, "p", job.model_id, 5) is None


def test_the_first_use_of_a_key_does_the_work_and_later_ones_get_its_answer(database: str) -> None:
    with transaction() as session:
        assert idempotency.claim_key(session, "p", "POST /jobs", "k", "body") is None
        idempotency.store_response(session, "p", "POST /jobs", "k", {"id": 1})
    with transaction() as session:
        known = idempotency.Claimed("body", {"id": 1})
        assert idempotency.claim_key(session, "p", "POST /jobs", "k", "other body") == known
        assert idempotency.find_key(session, "p", "POST /jobs", "k") == known
        assert idempotency.claim_key(session, "other", "POST /jobs", "k", "body") is None
        assert idempotency.claim_key(session, "p", "POST /files", "k", "body") is None
        assert idempotency.find_key(session, "p", "POST /jobs", "unknown") is None


def test_a_request_that_fails_leaves_its_key_free(database: str) -> None:
    with pytest.raises(ZeroDivisionError), transaction() as session:
        print(idempotency.claim_key(session, "p", "r", "k", "body") or 1 // 0)
    with transaction() as session:
        assert idempotency.claim_key(session, "p", "r", "k", "body") is None


def test_an_expired_key_is_free_again(session: Session) -> None:
    idempotency.claim_key(session, "p", "r", "k", "body")
    session.execute(text("UPDATE idempotency_keys SET expires_at = now() - interval '1 s'"))
    session.expire_all()
    assert idempotency.find_key(session, "p", "r", "k") is None
    assert idempotency.claim_key(session, "p", "r", "k", "new body") is None


def test_a_rival_waits_for_the_answer_of_the_first(database: str) -> None:
    answers: list[idempotency.Claimed | None] = []

    def rival() -> None:
        with transaction() as session:
            answers.append(idempotency.claim_key(session, "p", "r", "k", "body"))

    with transaction() as session:
        assert idempotency.claim_key(session, "p", "r", "k", "body") is None
        thread = threading.Thread(target=rival)
        thread.start()
        time.sleep(0.3)
        assert not answers
        idempotency.store_response(session, "p", "r", "k", {"id": 1})
    thread.join(10)
    assert answers == [idempotency.Claimed("body", {"id": 1})]


def test_a_rival_that_waits_too_long_is_told_to_come_back(session: Session, database: str) -> None:
    idempotency.claim_key(session, "p", "r", "k", "body")
    with transaction() as other:
        other.execute(text("SET LOCAL lock_timeout = '50ms'"))
        assert idempotency.claim_key(other, "p", "r", "k", "body") == idempotency.Claimed(
            "body", None
        )


def test_ten_submissions_with_one_key_make_one_job(database: str) -> None:
    def submit(number: int) -> None:
        with transaction() as session:
            if idempotency.claim_key(session, "p", "r", "k", "body") is None:
                jobs.insert_job(
                    session,
                    id=f"job-{number}",
                    project_id="p",
                    kind="distillation",
                    spec={},
                    model_id="m",
                )
                idempotency.store_response(session, "p", "r", "k", {"id": number})

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    with transaction() as session:
        assert session.scalar(text("SELECT count(*) FROM jobs")) == 1
