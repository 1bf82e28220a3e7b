"""The engine's connections: one that died while idle is replaced, and a read is no transaction."""

import psycopg
import pytest
from sqlalchemy import Integer, func, literal_column, select, text

from app.db import session as sessions
from app.db.session import DatabaseUnavailable, read_row, transaction

ONE = select(literal_column("1", Integer))
WHO = select(func.pg_backend_pid(), func.now())


def end_all_connections(database: str) -> None:
    """Of everybody but the asker, who is another engine. Returns when their processes are gone."""
    made = sessions.make_engine(sessions.sqlalchemy_url(database))
    with made.begin() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
    made.dispose()


def test_a_connection_that_died_while_idle_is_replaced(database: str) -> None:
    with transaction() as session:
        first = session.scalar(text("SELECT pg_backend_pid()"))
    end_all_connections(database)
    with transaction() as session:
        assert session.scalar(text("SELECT pg_backend_pid()")) != first
    end_all_connections(database)
    assert read_row(ONE) == (1,)


def test_one_that_died_unnoticed_is_an_error_once(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "_has_news", lambda descriptor: False)
    with transaction() as session:
        session.scalar(text("SELECT 1"))
    end_all_connections(database)
    with pytest.raises(DatabaseUnavailable):
        read_row(ONE)
    assert read_row(ONE) == (1,)


def test_a_read_holds_no_transaction_and_leaves_the_connection_as_it_was(database: str) -> None:
    pid, read_at = read_row(WHO) or ()
    again = read_row(WHO) or ()
    assert again[0] == pid
    assert again[1] > read_at  # the time of its transaction: another each
    with pytest.raises(RuntimeError):
        make_a_table_and_fail(pid)
    assert read_row(select(func.to_regclass("scratch"))) == (None,)


def test_a_read_that_the_server_refuses_leaves_the_connection_as_it_was(database: str) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero):
        read_row(select(literal_column("1 / 0")))
    test_a_read_holds_no_transaction_and_leaves_the_connection_as_it_was(database)


def make_a_table_and_fail(pid: int) -> None:
    with transaction() as session:
        assert session.scalar(text("SELECT pg_backend_pid()")) == pid
        session.execute(text("CREATE TABLE scratch (a int)"))
        raise RuntimeError
