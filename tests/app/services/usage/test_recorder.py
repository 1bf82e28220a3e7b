"""Usage on its way to a real Postgres: nothing is lost in an outage, and nothing is added twice."""

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, select

from app.db.schema.usage_tables import TokenUsage, UsageWriter
from app.db.session import DatabaseUnavailable, engine, transaction
from app.db.usage import records
from app.db.usage.records import Usage, UsageCounts, UsageKey
from app.services.limits.budgets import period_end, read_used_tokens
from app.services.usage.recorder import UsageRecorder
from app.settings import Settings
from tests.worker.lost_answers import LostAnswers

ANSWER = Usage("tiny", 10, 4, 5)
Sums = tuple[int, int, int, int]


def stored() -> Sums:
    names = ("num_requests", "input_tokens", "cached_tokens", "output_tokens")
    with transaction() as session:
        columns = [func.coalesce(func.sum(getattr(TokenUsage, name)), 0) for name in names]
        row = session.execute(select(*columns)).one()
    return int(row[0]), int(row[1]), int(row[2]), int(row[3])


def used(day: datetime, key_id: str = "k", project_id: str = "p") -> dict[tuple[str, str], int]:
    with transaction() as session:
        found, _ = records.used_tokens(session, key_id=key_id, project_id=project_id, now=day)
    return {(str(kind), str(period)): tokens for (kind, period), tokens in found.items()}


def test_what_is_added_is_written_when_the_process_stops(database: str) -> None:
    recorder = UsageRecorder()
    recorder.start()
    for _ in range(3):
        recorder.add("p", "k", ANSWER)
    recorder.stop()
    assert stored() == (3, 30, 12, 15)
    with transaction() as session:
        assert session.scalars(select(UsageWriter.id)).all() == []


def test_an_outage_of_the_database_loses_nothing_and_adds_nothing_twice(
    database: str, settings_env: Callable[..., Settings]
) -> None:
    recorder = UsageRecorder()
    recorder.add("p", "k", ANSWER)
    recorder.write()
    settings_env(database_url="postgresql://nobody@127.0.0.1:9/none")
    recorder.add("p", "k", ANSWER)
    for _ in range(2):
        with pytest.raises(DatabaseUnavailable):
            recorder.write()
        recorder.add("p", "k", ANSWER)
    now = datetime.now(UTC)
    assert recorder.unwritten_tokens("p", "k", "key", "day", now) == 45
    assert recorder.unwritten_tokens("p", "other", "project", "month", now) == 45
    assert recorder.unwritten_tokens("p", "other", "key", "month", now) == 0
    settings_env(database_url=database)
    recorder.write()
    recorder.write()
    assert stored() == (4, 40, 16, 20)
    assert recorder.unwritten_tokens("p", "k", "key", "day", now) == 0


def test_a_write_that_is_repeated_because_its_commit_was_not_confirmed_counts_once(
    database: str,
) -> None:
    with transaction() as session:
        assert records.begin_write(session, "w", 1)
    with transaction() as session:
        assert not records.begin_write(session, "w", 1)
        assert records.begin_write(session, "w", 2)
        assert records.begin_write(session, "other", 1)


@pytest.fixture
def lost_answers(database: str, settings_env: Callable[..., Settings]) -> Iterator[LostAnswers]:
    proxy = LostAnswers(database)
    settings_env(database_url=proxy.url)
    yield proxy
    engine().dispose()
    settings_env(database_url=database)
    proxy.close()


def test_usage_whose_commit_was_not_confirmed_counts_once(lost_answers: LostAnswers) -> None:
    recorder = UsageRecorder()
    recorder.add("p", "k", ANSWER)
    lost_answers.is_armed.set()
    with pytest.raises(DatabaseUnavailable):
        recorder.write()
    assert lost_answers.num_lost == 1
    recorder.add("p", "k", ANSWER)
    for _ in range(2):
        now = datetime.now(UTC)
        assert set(read_used_tokens("p", "k", now, recorder).values()) == {30}
        recorder.write()
    recorder.write()
    assert stored() == (2, 20, 8, 10)


def test_budgets_are_read_exactly_while_usage_is_written(database: str) -> None:
    recorder = UsageRecorder()
    is_over = threading.Event()

    def write_often() -> None:
        while not is_over.is_set():
            recorder.write()

    thread = threading.Thread(target=write_often)
    thread.start()
    try:
        for number in range(1, 101):
            recorder.add("p", "k", ANSWER)
            used = read_used_tokens("p", "k", datetime.now(UTC), recorder)
            assert set(used.values()) == {15 * number}
    finally:
        is_over.set()
        thread.join(60)


def test_writers_of_the_same_rows_neither_lose_tokens_nor_block_each_other(database: str) -> None:
    recorders = [UsageRecorder() for _ in range(4)]

    def write_often(recorder: UsageRecorder) -> None:
        for number in range(20):
            for key in ("a", "b", "c") if number % 2 else ("c", "b", "a"):
                recorder.add("p", key, ANSWER)
            recorder.write()

    threads = [threading.Thread(target=write_often, args=(each,)) for each in recorders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert stored() == (240, 2400, 960, 1200)
    assert used(datetime.now(UTC), "a")["key", "day"] == 80 * 15
    assert used(datetime.now(UTC))["project", "month"] == 240 * 15


def test_totals_are_those_of_the_current_day_and_month(database: str) -> None:
    month_end = datetime(2026, 1, 31, 23, 59, tzinfo=UTC)

    def add(minute: datetime, num_tokens: int, key_id: str = "k") -> None:
        key = UsageKey(minute, "p", key_id, "m", is_batch=False)
        with transaction() as session:
            records.add_usage(session, [(key, UsageCounts(1, num_tokens, 0, 0))])

    def totals(tokens_of_day: int, tokens_of_month: int) -> dict[tuple[str, str], int]:
        return {
            (kind, period): tokens
            for kind in ("key", "project")
            for period, tokens in (("day", tokens_of_day), ("month", tokens_of_month))
        }

    add(month_end - timedelta(days=1), 1)
    add(month_end, 2)
    assert used(month_end) == totals(2, 3)
    after = month_end + timedelta(minutes=1)
    assert used(after) == {}
    add(after, 4)
    add(month_end, 8)  # written late, after an outage
    assert used(after) == totals(4, 4)
    add(after, 16, key_id="other")
    assert used(after)["project", "day"] == 20
    assert used(after)["key", "day"] == 4
    assert [period_end(month_end, period) for period in ("day", "month")] == [after, after]
    assert period_end(after, "month") == datetime(2026, 3, 1, tzinfo=UTC)
