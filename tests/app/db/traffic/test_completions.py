"""Stored completions in a real database: each record once, pages, usage and retention."""

import json
from collections.abc import Callable

import pytest
from sqlalchemy import text

from app.db.pagination import UnknownCursor
from app.db.session import transaction
from app.db.traffic.completions import (
    CompletionFilter,
    delete_completions,
    insert_records,
    num_loaded,
    page_completions,
)
from app.services.traffic import retention
from app.services.traffic.retention import delete_unretained
from app.settings import Settings
from tests.stored_rows import BEGUN_AT, insert, record

ALL = CompletionFilter()
MANY_BYTES = 10**9


def lines_of(*numbers: int) -> list[bytes]:
    return [json.dumps(record(number)).encode() for number in numbers]


def stored_ids(project_id: str = "acme") -> list[str]:
    with transaction() as session:
        rows, has_more = page_completions(
            session, project_id, ALL, limit=1000, most_bytes=MANY_BYTES
        )
    assert not has_more
    return [row.id for row in rows]


def usage() -> tuple[int, int]:
    with transaction() as session:
        row = session.execute(text("SELECT num_completions, bytes FROM stored_usage")).one()
        assert row.bytes == session.scalar(
            text("SELECT coalesce(sum(bytes), 0) FROM stored_completions")
        )
    return row.num_completions, row.bytes


def test_a_record_before_the_mark_is_not_inserted_again_even_if_it_was_deleted(
    database: str,
) -> None:
    with transaction() as session:
        assert insert_records(session, "segment", 0, lines_of(0, 1, 2)) == 3
        assert delete_completions(session, "acme", ["chatcmpl-0001"]) == 1
    with transaction() as session:
        assert insert_records(session, "segment", 0, lines_of(0, 1, 2, 3)) == 1
        assert num_loaded(session, "segment") == 4
    assert stored_ids() == ["chatcmpl-0000", "chatcmpl-0002", "chatcmpl-0003"]
    assert usage()[0] == 3


def test_pages_follow_the_time_of_the_request_in_both_orders(database: str) -> None:
    insert([record(number) for number in (3, 1, 2, 0)])
    with transaction() as session:
        first, has_more = page_completions(session, "acme", ALL, limit=3, most_bytes=MANY_BYTES)
        assert has_more
        rest, has_more = page_completions(
            session, "acme", ALL, after=first[-1].id, limit=3, most_bytes=MANY_BYTES
        )
        newest, _ = page_completions(
            session, "acme", ALL, limit=1, order="desc", most_bytes=MANY_BYTES
        )
        assert not has_more
        with pytest.raises(UnknownCursor):
            page_completions(session, "rival", ALL, after=first[0].id, most_bytes=MANY_BYTES)
    assert [row.id[-1] for row in [*first, *rest, *newest]] == ["0", "1", "2", "3", "3"]


def test_a_page_ends_before_it_has_too_many_bytes(database: str) -> None:
    insert([record(number) for number in range(4)])
    size = record(0)["bytes"]
    with transaction() as session:
        rows, has_more = page_completions(session, "acme", ALL, limit=4, most_bytes=2 * size)
        assert (len(rows), has_more) == (2, True)
        rows, has_more = page_completions(session, "acme", ALL, limit=4, most_bytes=1)
        assert (len(rows), has_more) == (1, True)


def test_the_oldest_completions_go_first_until_the_project_has_room(
    database: str, settings_env: Callable[..., Settings]
) -> None:
    insert([record(number) for number in range(10)])
    insert([record(99, project_id="small")])
    size = record(0)["bytes"]
    settings_env(stored_bytes_per_project=4 * size, stored_max_age_seconds=10**9)
    assert delete_unretained() == 6
    assert stored_ids() == [f"chatcmpl-{number:04}" for number in range(6, 10)]
    assert stored_ids("small") == ["chatcmpl-0099"]


def test_a_busy_project_uses_the_steps_that_idle_ones_leave(
    database: str, settings_env: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "STEP_ROWS", 1)
    monkeypatch.setattr(retention, "MAX_STEPS", 6)
    for name in ("idle", "quiet"):
        insert([record(90, project_id=name)])
    insert([record(number) for number in range(8)])
    settings_env(stored_bytes_per_project=2 * record(0)["bytes"], stored_max_age_seconds=10**9)
    assert delete_unretained() == 6
    assert len(stored_ids()) == 2


def test_completions_above_the_maximum_age_are_deleted(
    database: str, settings_env: Callable[..., Settings]
) -> None:
    insert([record(number) for number in range(3)])
    with transaction() as session:
        now = session.scalars(text("SELECT extract(epoch FROM now())")).one()
    settings_env(stored_max_age_seconds=float(now) - BEGUN_AT - 1.5)
    assert delete_unretained() == 2
    assert stored_ids() == ["chatcmpl-0002"]
    assert usage()[0] == 1
