"""Database engine of the process, and the only place that commits transactions."""

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


IDLE_SECONDS = 15.0  # a connection that was idle for longer is pinged before it is used


def make_engine(url: str, *, pool_size: int = 10, statement_timeout_ms: int = 30_000) -> Engine:
    """Returns an engine whose connections detect a dead server and never wait indefinitely."""
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
    _ping_idle_connection(made)
    return made


def _ping_idle_connection(made: Engine) -> None:
    """Makes the pool ping a connection before its use if the server may have closed it.

    That is the case after IDLE_SECONDS without use, or if the socket is readable, because an idle
    connection normally receives nothing else. `pool_pre_ping` would delay each read by a round trip.
    """

    def used(
        connection: Any, record: Any, *_: Any
    ) -> None:  # Any: the driver's, and SQLAlchemy's record of it
        """Records when the connection was last used."""
        record.info["used_at"] = time.monotonic()

    def ask(connection: Any, record: Any, _: Any) -> None:
        """Pings the connection if needed. Raises DisconnectionError if the ping fails."""
        if time.monotonic() - record.info["used_at"] < IDLE_SECONDS and not _has_news(
            connection.fileno()
        ):
            return
        try:
            made.dialect.do_ping(connection)
        except made.dialect.loaded_dbapi.Error as e:
            raise DisconnectionError from e  # the pool then opens another one

    event.listen(made, "connect", used)
    event.listen(made, "checkin", used)
    event.listen(made, "checkout", ask)


def _has_news(descriptor: int) -> bool:
    """Returns whether a socket is readable or was closed by the other side."""
    poll = select.poll()  # select() does not support descriptors above 1023
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def sqlalchemy_url(url: str) -> str:
    """Returns the URL in SQLAlchemy's form, which selects the psycopg 3 driver."""
    scheme, _, rest = url.partition("://")
    return f"postgresql+psycopg://{rest}" if scheme in {"postgres", "postgresql"} else url


@lru_cache
def engine() -> Engine:
    """Returns the engine of this process."""
    return make_engine(sqlalchemy_url(get_settings().database_url))


@lru_cache(maxsize=2)
def _sessions(made: Engine) -> "sessionmaker[Session]":
    """Returns the session factory. It is cached because creating one is slow."""
    return sessionmaker(made, expire_on_commit=False)


@contextmanager
def transaction() -> Iterator[Session]:
    """Begins a transaction. Commits it after the block, or rolls it back if the block raises."""
    with _sessions(engine())() as session:
        try:
            yield session
            session.commit()
        except BaseException:
            session.rollback()
            raise


def read_row(query: Select[Any], **values: object) -> tuple[Any, ...] | None:
    """Returns the first committed row that matches the query, or None.

    `values` are the bound parameters. Each query object is compiled once, so create it once and
    keep it. Used for reads that delay the first token: autocommit needs one round trip where a
    transaction needs three, and bypassing the session avoids its overhead.

    Raises DatabaseUnavailable, or PoolExhausted if no connection becomes free.
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
    """Returns the query compiled for the driver, cached per query object."""
    return query.compile(dialect=engine().dialect)
