"""The one engine of a process and the one place that commits."""

import select
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import psycopg
from sqlalchemy import Compiled, Engine, Select, create_engine, event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.exc import OperationalError as DatabaseUnavailable
from sqlalchemy.exc import TimeoutError as PoolExhausted
from sqlalchemy.orm import Session, sessionmaker

from app.settings import get_settings

__all__ = [
    "DatabaseUnavailable",
    "PoolExhausted",
    "Session",
    "engine",
    "make_engine",
    "read_row",
    "sqlalchemy_url",
    "transaction",
]


IDLE_SECONDS = (
    15.0  # after which a connection is asked whether it still lives, whatever its socket says
)


def make_engine(url: str, *, pool_size: int = 10, statement_timeout_ms: int = 30_000) -> Engine:
    """An engine whose connections notice a dead server and never wait forever."""
    made = create_engine(
        url,
        pool_recycle=900,
        pool_timeout=5,
        pool_size=pool_size,
        max_overflow=5,
        pool_use_lifo=True,
        connect_args={
            "connect_timeout": 5,
            "keepalives": 1,
            "keepalives_idle": 15,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 15_000,
            "options": f"-c statement_timeout={statement_timeout_ms} -c lock_timeout=5000 "
            "-c idle_in_transaction_session_timeout=30000 -c timezone=UTC",
        },
    )
    _ping_the_idle(made)
    return made


def _ping_the_idle(made: Engine) -> None:
    """Before a connection's use, if it was idle for long or its socket has news, which a server's end is and nothing else.

    AnswerSampling at every use (pool_pre_ping) was half of a short read's time.
    """

    def used(
        connection: Any, record: Any, *_: Any
    ) -> None:  # Any: the driver's, and SQLAlchemy's record of it
        record.info["used_at"] = time.monotonic()

    def ask(connection: Any, record: Any, _: Any) -> None:
        if time.monotonic() - record.info["used_at"] < IDLE_SECONDS and not _has_news(
            connection.fileno()
        ):
            return
        try:
            made.dialect.do_ping(connection)
        except made.dialect.loaded_dbapi.Error as e:
            raise DisconnectionError from e  # the pool then makes another

    event.listen(made, "connect", used)
    event.listen(made, "checkin", used)
    event.listen(made, "checkout", ask)


def _has_news(descriptor: int) -> bool:
    """Whether a socket can be read, or was closed from the other side."""
    poll = select.poll()  # select() itself knows no descriptor above 1023
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def sqlalchemy_url(url: str) -> str:
    """The same URL with the psycopg 3 driver named."""
    scheme, _, rest = url.partition("://")
    return f"postgresql+psycopg://{rest}" if scheme in {"postgres", "postgresql"} else url


@lru_cache
def engine() -> Engine:
    return make_engine(sqlalchemy_url(get_settings().database_url))


@lru_cache(maxsize=2)
def _sessions(made: Engine) -> "sessionmaker[Session]":
    """Made once: making one takes as long as a short read."""
    return sessionmaker(made, expire_on_commit=False)


@contextmanager
def transaction() -> Iterator[Session]:
    """One transaction: committed when the block ends, rolled back when it raises."""
    with _sessions(engine())() as session:
        try:
            yield session
            session.commit()
        except BaseException:
            session.rollback()
            raise


def read_row(query: Select[Any], **values: object) -> tuple[Any, ...] | None:
    """The row that the query finds of what is committed by now, or None; the values are its bound parameters.

    For reads that a first token waits for: one trip to the server, where a transaction has three, and past the session,
    which takes five times as long as the read itself. Raises DatabaseUnavailable.
    """
    compiled = _compiled(query)
    text, values = compiled.string, {**compiled.params, **values}
    connection = None
    try:
        connection = engine().raw_connection()
        driver = cast("psycopg.Connection[tuple[Any, ...]]", connection.driver_connection)
        driver.autocommit = True
        try:
            return driver.execute(text.encode(), values).fetchone()
        finally:
            if not driver.closed:
                driver.autocommit = False
    except psycopg.OperationalError as error:
        if connection is not None:
            connection.invalidate(error)
        raise DatabaseUnavailable(text, values, error) from error
    finally:
        if connection is not None:
            connection.close()


@lru_cache
def _compiled(query: Select[Any]) -> Compiled:
    """As the driver has it; queries are made once and kept."""
    return query.compile(dialect=engine().dialect)
