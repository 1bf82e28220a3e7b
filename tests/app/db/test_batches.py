"""The lease of a batch, and what may be written under it."""

from typing import Any

import pytest
from sqlalchemy import text

from app.db import batches, files, reconciliation
from app.db.schema.tables import Batch, BatchResult, BatchStatus
from app.db.session import Session


@pytest.fixture
def batch(session: Session) -> Batch:
    columns: dict[str, Any] = {"id": "batch_1", "project_id": "p", "endpoint": "/v1/completions"}
    columns |= {"input_file_id": "f", "input_key": "files/f", "num_requests": 2}
    return batches.insert_batch(session, errors=[], **columns)


def claim(session: Session, lease_seconds: float = 60) -> int:
    claimed = batches.claim(session, lease_seconds)
    assert claimed is not None
    assert claimed.lease_token is not None
    return claimed.lease_token


def answer(
    session: Session, token: int, line: int, output: str = "{}", *, is_error: bool = False
) -> bool:
    return batches.record(session, "batch_1", token, line=line, output=output, is_error=is_error)


def counts(session: Session) -> tuple[int, int]:
    found = batches.find_batch(session, "p", "batch_1")
    assert found is not None
    session.refresh(found)
    return found.num_completed, found.num_failed


def page(
    session: Session, line: int, *, max_rows: int = 10, max_bytes: int = 1000
) -> list[BatchResult]:
    return batches.results_after(session, "batch_1", line, max_rows=max_rows, max_bytes=max_bytes)


def results(session: Session) -> list[tuple[int, str]]:
    return [(row.line, row.output) for row in page(session, 0)]


def expire_lease(session: Session) -> None:
    session.execute(text("UPDATE batches SET lease_expires_at = now() - interval '1 s'"))


def test_a_batch_has_one_runner_until_its_lease_is_over_or_given_back(
    session: Session, batch: Batch
) -> None:
    first = claim(session)
    assert batches.claim(session, 60) is None
    expire_lease(session)
    second = claim(session)
    assert batches.renew(session, "batch_1", first, 60) is None
    batches.release(session, "batch_1", first)
    assert batches.claim(session, 60) is None
    batches.release(session, "batch_1", second)
    assert claim(session) > second


def test_a_line_is_kept_once_and_only_from_the_runner_of_now(
    session: Session, batch: Batch
) -> None:
    first = claim(session)
    assert answer(session, first, 1, "one")
    assert answer(session, first, 1, "one again")
    expire_lease(session)
    second = claim(session)
    assert not answer(session, first, 2, "late")
    assert answer(session, second, 2, "two", is_error=True)
    assert results(session) == [(1, "one"), (2, "two")]
    assert counts(session) == (1, 1)
    assert batches.answered_lines(session, "batch_1") == {1, 2}


@pytest.mark.parametrize("ending", ["cancel", "finalize", "expire"])
def test_what_comes_next_freezes_the_results(session: Session, batch: Batch, ending: str) -> None:
    token = claim(session)
    assert answer(session, token, 1)
    if ending == "cancel":
        assert batches.request_cancel(session, "batch_1") is not None
    elif ending == "finalize":
        assert batches.begin_finalizing(session, "batch_1", token) is not None
    else:
        session.execute(text("UPDATE batches SET expires_at = now()"))
        assert batches.renew(session, "batch_1", token, 60) is not None
    assert not answer(session, token, 2)
    frozen = batches.begin_finalizing(session, "batch_1", token)
    assert frozen is not None
    assert frozen.status == ("cancelling" if ending == "cancel" else "finalizing")


def test_a_batch_whose_time_was_up_before_it_was_taken_needs_only_its_files(
    session: Session, batch: Batch
) -> None:
    claim(session)
    expire_lease(session)
    session.execute(text("UPDATE batches SET expires_at = now()"))
    claimed = batches.claim(session, 60)
    assert claimed is not None
    assert claimed.status == "finalizing"


def test_a_batch_that_is_cancelled_before_it_began_needs_only_its_files(
    session: Session, batch: Batch
) -> None:
    assert batches.claim(session, 60, only_ending=True) is None
    batches.request_cancel(session, "batch_1")
    claimed = batches.claim(session, 60, only_ending=True)
    assert claimed is not None
    assert (claimed.status, claimed.in_progress_at) == ("cancelling", None)


def test_the_end_makes_the_files_known_and_forgets_the_results(
    session: Session, batch: Batch
) -> None:
    token = claim(session)
    answer(session, token, 1)
    batches.begin_finalizing(session, "batch_1", token)
    output = {
        "id": "file-o",
        "filename": "o",
        "bytes": 1,
        "sha256": "0" * 64,
        "store_key": "files/file-o",
    }
    ended: dict[str, Any] = {
        "status": BatchStatus.completed,
        "output_file": output,
        "error_file": None,
    }
    assert not batches.finish(session, "batch_1", token + 1, **ended)
    assert files.find_file(session, "p", "file-o") is None
    assert batches.finish(session, "batch_1", token, **ended)
    found = files.find_file(session, "p", "file-o")
    assert found is not None
    assert found.purpose == "batch_output"
    assert results(session) == []
    assert not batches.finish(session, "batch_1", token, **ended)
    assert batches.count_active(session, "p") == 0


def test_an_expired_input_file_is_kept_until_its_batch_has_ended(
    session: Session, batch: Batch
) -> None:
    columns: dict[str, Any] = {"filename": "f", "purpose": "batch", "bytes": 1, "sha256": "0" * 64}
    files.insert_file(session, id="f", project_id="p", store_key="files/f", **columns)
    session.execute(text("UPDATE files SET expires_at = now() - interval '1 s'"))
    assert files.readers_of_file(session, "p", "f") == ["batch_1"]
    assert reconciliation.forget_expired_files(session) == []
    session.execute(text("UPDATE batches SET status = 'cancelled'"))
    assert reconciliation.forget_expired_files(session) == ["files/f"]


def test_results_are_read_in_pages_of_bytes_and_a_large_one_alone(
    session: Session, batch: Batch
) -> None:
    token = claim(session)
    for line, num_characters in enumerate((40, 50, 30, 500, 10, 10), 1):
        answer(session, token, line, "é" * num_characters)
    pages, line = [], 0
    while rows := page(session, line, max_bytes=200):
        pages.append([row.line for row in rows])
        line = rows[-1].line
    assert pages == [[1, 2], [3], [4], [5, 6]]
    assert [row.line for row in page(session, 0, max_rows=1)] == [1]
