"""A real Postgres and a real Valkey for every test that asks for them."""

from app.fast_imports import imports_done  # isort: split

import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import redis
from psycopg import sql

from app.db.schema.migrate import upgrade
from app.db.session import engine
from app.local.embedded_servers import LocalPostgres, LocalValkey
from app.settings import Settings, get_settings
from app.storage import store
from tests.spare_databases import SpareDatabases, database_url

pytest_plugins = ["tests.tiny", "tests.tool_model"]

# A progress bar whose output fails keeps the lock that all bars share, and blocks every later load.
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--schedules", type=int, default=3, help="random schedules of each served family"
    )


def pytest_collection_finish() -> None:
    imports_done()


@pytest.fixture(autouse=True, scope="module")
def hide_earlier_objects() -> None:
    """Hides what earlier test files have left in memory from the garbage collector.

    Jobs and evaluations call `gc.collect()`, which visits every object of the process. Without
    this, each such call in a late test also visits the caches and modules of all earlier tests.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def service_dir() -> Iterator[Path]:
    """A short folder that the servers' user can reach; pytest's own temporary folders are closed to it."""
    folder = Path(tempfile.mkdtemp(prefix="still-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_url(service_dir: Path) -> Iterator[str]:
    """A Postgres server: the one STILLHOUSE_TEST_DATABASE_URL names, else one of this session."""
    if url := os.environ.get("STILLHOUSE_TEST_DATABASE_URL"):
        yield url
        return
    unsafe_but_quick = (
        "fsync=off",
        "synchronous_commit=off",
        "full_page_writes=off",
        "shared_buffers=64MB",
    )
    with LocalPostgres(service_dir, options=unsafe_but_quick) as postgres:
        yield postgres.url


@pytest.fixture(scope="session")
def valkey_url(service_dir: Path) -> Iterator[str]:
    """A Valkey server: the one STILLHOUSE_TEST_REDIS_URL names, else one of this session."""
    if url := os.environ.get("STILLHOUSE_TEST_REDIS_URL"):
        yield url
        return
    with LocalValkey(service_dir) as valkey:
        yield valkey.url


@pytest.fixture(scope="session")
def template_database(postgres_url: str) -> Iterator[str]:
    """Name of a migrated, empty database, from which the databases of the tests are copied."""
    name = f"template_{os.getpid()}"
    _run(postgres_url, "DROP DATABASE IF EXISTS {} WITH (FORCE)", name)
    _run(postgres_url, "CREATE DATABASE {}", name)
    upgrade(database_url(postgres_url, name))
    yield name
    _run(postgres_url, "DROP DATABASE IF EXISTS {} WITH (FORCE)", name)


@pytest.fixture
def settings_env(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., Settings]]:
    """A function that sets settings by field name, for this process and its children.

    Without a call, only the data folder is set: to a fresh one.
    """

    def set_them(**values: object) -> Settings:
        for name, value in values.items():
            monkeypatch.setenv(f"STILLHOUSE_{name.upper()}", str(value))
        _forget()
        return get_settings()

    for name in list(os.environ):
        if name.startswith("STILLHOUSE_") and not name.startswith("STILLHOUSE_TEST_"):
            monkeypatch.delenv(name)
    set_them(data_dir=tmp_path / "data")
    yield set_them
    _forget()


@pytest.fixture(scope="session")
def spare_databases(postgres_url: str, template_database: str) -> Iterator[SpareDatabases]:
    """The databases of this session, which are dropped at its end."""
    databases = SpareDatabases(postgres_url, template_database)
    yield databases
    databases.drop_all()


@pytest.fixture
def database(
    spare_databases: SpareDatabases, settings_env: Callable[..., Settings]
) -> Iterator[str]:
    """URL of an empty, migrated database that the settings point to."""
    url = spare_databases.take()
    settings_env(database_url=url)
    yield url
    engine().dispose()
    spare_databases.give_back(url)


@pytest.fixture
def valkey(valkey_url: str, settings_env: Callable[..., Settings]) -> str:
    """URL of an empty Valkey that the settings point to."""
    with redis.Redis.from_url(valkey_url) as client:
        client.flushall()
    settings_env(redis_url=valkey_url)
    return valkey_url


def _run(server_url: str, command: str, *names: str) -> None:
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(sql.SQL(command).format(*map(sql.Identifier, names)))


def _forget() -> None:
    """Drops what is cached by the settings, closing idle connections of the old engine."""
    if engine.cache_info().currsize:
        engine().dispose()
    get_settings.cache_clear()
    engine.cache_clear()
    store.cache_clear()
