"""The one engine of a process and the one place that commits."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from sqlalchemy import Engine, create_engine
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
    "sqlalchemy_url",
    "transaction",
]


def make_engine(url: str, *, pool_size: int = 10, statement_timeout_ms: int = 30_000) -> Engine:
    """An engine whose connections notice a dead server and never wait forever."""
    return create_engine(
        url,
        pool_pre_ping=True,
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


def sqlalchemy_url(url: str) -> str:
    """The same URL with the psycopg 3 driver named."""
    scheme, _, rest = url.partition("://")
    return f"postgresql+psycopg://{rest}" if scheme in {"postgres", "postgresql"} else url


@lru_cache
def engine() -> Engine:
    return make_engine(sqlalchemy_url(get_settings().database_url))


@contextmanager
def transaction() -> Iterator[Session]:
    """One transaction: committed when the block ends, rolled back when it raises."""
    with sessionmaker(engine(), expire_on_commit=False)() as session:
        try:
            yield session
            session.commit()
        except BaseException:
            session.rollback()
            raise
