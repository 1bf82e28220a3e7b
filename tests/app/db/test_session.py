"""The engine's connections: one that died while idle is replaced, and a read is no transaction."""

import pytest
from sqlalchemy import text

from app.db import session as sessions
from app.db.session import DatabaseUnavailable, reading, transaction


def end_all_connections(database: str) -> None:
    """Of everybody but the asker, who is another engine."""
    made = sessions.make_engine(sessions.sqlalchemy_url(database))
    with made.begin() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
    made.dispose()


def test_a_connection_that_died_while_idle_is_replaced(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "IDLE_SECONDS", 0.0)
    with transaction() as session:
        first = session.scalar(text("SELECT pg_backend_pid()"))
    end_all_connections(database)
    with transaction() as session:
        assert session.scalar(text("SELECT pg_backend_pid()")) != first


def test_one_that_died_in_use_is_an_error_once(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "IDLE_SECONDS", 60.0)
    with transaction() as session:
        session.scalar(text("SELECT 1"))
    end_all_connections(database)
    with pytest.raises(DatabaseUnavailable), reading() as session:
        session.scalar(text("SELECT 1"))
    with reading() as session:
        assert session.scalar(text("SELECT 1")) == 1


def test_a_read_holds_no_transaction_and_leaves_the_connection_as_it_was(database: str) -> None:
    with reading() as session:
        assert session.scalar(text("SELECT count(*) FROM files")) == 0
        read_at = session.scalar(text("SELECT now()"))
        assert session.scalar(text("SELECT now()")) > read_at  # the time of its transaction: another each
    with pytest.raises(RuntimeError):
        make_a_table_and_fail()
    with reading() as session:
        assert session.scalar(text("SELECT to_regclass('scratch')")) is None


def make_a_table_and_fail() -> None:
    with transaction() as session:
        session.execute(text("CREATE TABLE scratch (a int)"))
        raise RuntimeError
