"""The one engine of a process and the one place that commits."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from sqlalchemy import Engine, create_engine, event
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
    "reading",
    "sqlalchemy_url",
    "transaction",
]


IDLE_SECONDS = 1.0  # after which a connection is asked whether it still lives


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
    """Before a connection's use, if it was idle; asking at every use (pool_pre_ping) was half of a short read's time."""

    def used(
        connection: Any, record: Any, *_: Any
    ) -> None:  # Any: the driver's, and SQLAlchemy's record of it
        record.info["used_at"] = time.monotonic()

    def ask(connection: Any, record: Any, _: Any) -> None:
        if time.monotonic() - record.info["used_at"] < IDLE_SECONDS:
            return
        try:
            made.dialect.do_ping(connection)
        except made.dialect.loaded_dbapi.Error as e:
            raise DisconnectionError from e  # the pool then makes another

    event.listen(made, "connect", used)
    event.listen(made, "checkin", used)
    event.listen(made, "checkout", ask)


def sqlalchemy_url(url: str) -> str:
    """The same URL with the psycopg 3 driver named."""
    scheme, _, rest = url.partition("://")
    return f"postgresql+psycopg://{rest}" if scheme in {"postgres", "postgresql"} else url


@lru_cache
def engine() -> Engine:
    return make_engine(sqlalchemy_url(get_settings().database_url))


@lru_cache(maxsize=2)
def _sessions(made: Engine, *, autocommits: bool) -> "sessionmaker[Session]":
    """Made once: making one takes as long as a short read."""
    if autocommits:
        made = made.execution_options(isolation_level="AUTOCOMMIT")
    return sessionmaker(made, expire_on_commit=False)


@contextmanager
def transaction() -> Iterator[Session]:
    """One transaction: committed when the block ends, rolled back when it raises."""
    with _sessions(engine(), autocommits=False)() as session:
        try:
            yield session
            session.commit()
        except BaseException:
            session.rollback()
            raise


@contextmanager
def reading() -> Iterator[Session]:
    """For a few reads of which each may see what is committed by then: one trip to the server each, where a transaction has three."""
    with _sessions(engine(), autocommits=True)() as session:
        yield session
