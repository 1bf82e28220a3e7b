"""Metrics from a real database, also if one of its queries fails."""

import threading
from collections import Counter

import pytest
from sqlalchemy import event, text

from app.db.session import engine, transaction
from app.metrics import database as module
from app.metrics.database import DatabaseMetrics

SIZES = {"stillhouse_storage_bytes", "stillhouse_job_attempts"}
OTHERS = {
    "stillhouse_jobs",
    "stillhouse_queue_age_seconds",
    "stillhouse_trainer_tokens_per_second",
}


def names(metrics: DatabaseMetrics) -> set[str]:
    return {family.name for family in metrics.collect()}


def test_a_query_that_fails_leaves_out_only_its_own_metrics(database: str) -> None:
    metrics = DatabaseMetrics()
    with transaction() as session:
        session.execute(text("ALTER TABLE checkpoints RENAME TO renamed"))
    try:
        assert names(metrics) == OTHERS
    finally:
        with transaction() as session:
            session.execute(text("ALTER TABLE renamed RENAME TO checkpoints"))
    assert names(metrics) == OTHERS | SIZES


def test_of_several_first_scrapes_one_reads_the_sizes(database: str) -> None:
    metrics, num_queries = DatabaseMetrics(), Counter[bool]()

    def count(*arguments: object) -> None:
        num_queries["checkpoints" in str(arguments[2])] += 1

    event.listen(engine(), "before_cursor_execute", count)
    try:
        names(DatabaseMetrics())
        num_alone = num_queries[True]
        threads = [threading.Thread(target=names, args=(metrics,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    finally:
        event.remove(engine(), "before_cursor_execute", count)
    assert num_alone > 0
    assert num_queries[True] == 2 * num_alone


def test_without_a_thread_old_sizes_are_shown_and_read_later(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    metrics = DatabaseMetrics()
    assert names(metrics) == OTHERS | SIZES
    monkeypatch.setattr(module, "SIZE_SECONDS", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        for _ in range(2):
            assert names(metrics) == OTHERS | SIZES
    assert not metrics._lock.locked()
