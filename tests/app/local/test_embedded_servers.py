"""The embedded servers: real processes in folders of their own, restarted, killed and left behind."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import redis

from app.local.embedded_servers import (
    LocalPostgres,
    LocalValkey,
    apply_environment,
    free_port,
    read_service,
    remove_service,
    write_service,
)
from app.local.server_process import LocalServiceError, works_in
from app.settings import Settings, get_settings
from tests.waiting import wait_for

QUICK = ("fsync=off", "shared_buffers=16MB", "max_connections=20")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A data folder with a short name that other users may enter."""
    path = Path(tempfile.mkdtemp(prefix="local-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def remember(url: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")


def recall(url: str) -> int:
    with psycopg.connect(url) as connection:
        row = connection.execute("SELECT answer FROM kept").fetchone()
        assert row is not None
        return int(row[0])


def test_postgres_keeps_its_data_over_a_restart(folder: Path) -> None:
    with LocalPostgres(folder, options=QUICK) as first:
        remember(first.url)
    assert not first.is_running()
    with LocalPostgres(folder, options=QUICK) as second:
        assert recall(second.url) == 42
        assert second.url == first.url


def test_postgres_starts_again_after_it_was_killed(folder: Path) -> None:
    with LocalPostgres(folder, options=QUICK) as postgres:
        remember(postgres.url)
        assert postgres.process is not None
        postgres.process.kill()
        postgres.process.wait()
        assert not postgres.is_running()
        assert recall(postgres.start()) == 42


def test_a_second_owner_is_refused(folder: Path) -> None:
    with LocalPostgres(folder, options=QUICK), LocalValkey(folder) as valkey:
        for rival in (LocalPostgres(folder), LocalValkey(folder)):
            with pytest.raises(LocalServiceError, match="another process already runs"):
                rival.start()
        with redis.Redis.from_url(valkey.url) as client:
            assert client.ping()


@pytest.mark.parametrize("kind", ["LocalPostgres", "LocalValkey"])
def test_servers_end_with_a_killed_owner_and_the_next_one_finds_the_data(
    folder: Path, kind: str
) -> None:
    code = (
        "import sys, time; from pathlib import Path; from app.local.embedded_servers import LocalPostgres, LocalValkey\n"
        f"service = {kind}(Path(sys.argv[1])); service.start(); print(service.process.pid, flush=True); time.sleep(600)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout is not None
        server = int(owner.stdout.readline())
        data = folder / ("postgres" if kind == "LocalPostgres" else "valkey")
        assert works_in(server, data)
        if kind == "LocalPostgres":
            remember(LocalPostgres(folder).url)
        owner.kill()
    wait_for(lambda: not works_in(server, data))
    with LocalPostgres(folder) if kind == "LocalPostgres" else LocalValkey(folder) as service:
        assert service.is_running()
        if isinstance(service, LocalPostgres):
            assert recall(service.url) == 42


def test_a_server_that_outlived_its_owner_is_stopped_first(folder: Path) -> None:
    for kind in (LocalPostgres, LocalValkey):
        orphan = kind(folder)
        orphan.start()
        assert orphan.process is not None
        assert orphan._lock is not None
        orphan._lock.close()  # as if its owner had died, and the server had not noticed
        with kind(folder) as successor:
            assert successor.is_running()
            assert orphan.process.wait(10) is not None
            assert orphan.process.returncode is not None


def test_a_reused_process_id_is_not_taken_for_the_server(folder: Path) -> None:
    with LocalPostgres(folder, options=QUICK) as postgres:
        remember(postgres.url)
    bystander = subprocess.Popen(["sleep", "600"])
    (folder / "postgres" / "postmaster.pid").write_text(f"{bystander.pid}\n{folder}/postgres\n")
    with LocalPostgres(folder, options=QUICK) as postgres:
        assert recall(postgres.url) == 42
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_a_first_start_that_was_killed_half_way_is_begun_anew(folder: Path) -> None:
    (folder / "postgres.new" / "base").mkdir(parents=True)
    (folder / "postgres.new" / "PG_VERSION").write_text("18\n")
    with LocalPostgres(folder, options=QUICK) as postgres:
        remember(postgres.url)
        assert recall(postgres.url) == 42


def test_a_long_path_gets_a_short_socket(folder: Path) -> None:
    deep = folder / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    with LocalPostgres(deep, options=QUICK) as postgres:
        remember(postgres.url)
        socket_dir = postgres.socket_dir
        assert len(str(socket_dir)) < 60
    assert not socket_dir.exists()


def test_the_socket_is_for_its_owner_and_tcp_wants_the_password(folder: Path) -> None:
    with LocalPostgres(folder, tcp_port=free_port(), options=QUICK) as postgres:
        assert postgres.socket_dir.stat().st_mode & 0o077 == 0
        assert (folder / "postgres_password").stat().st_mode & 0o077 == 0
        remember(postgres.url)
        assert recall(postgres.tcp_url) == 42
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(f"postgresql://postgres:guess@127.0.0.1:{postgres.port}/postgres")


def test_no_port_is_opened_unless_asked_for(folder: Path) -> None:
    with (
        LocalPostgres(folder, options=QUICK) as postgres,
        psycopg.connect(postgres.url) as connection,
    ):
        row = connection.execute("SHOW listen_addresses").fetchone()
    assert row == ("",)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as another user")
def test_a_closed_parent_folder_stays_closed(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with LocalPostgres(tmp_path, options=QUICK) as postgres:
        home = postgres.home
        remember(postgres.url)
        assert home != tmp_path
        assert tmp_path.stat().st_mode & 0o777 == 0o700
    with LocalPostgres(tmp_path, options=QUICK) as postgres:
        assert recall(postgres.url) == 42
        assert postgres.home == home
    shutil.rmtree(home)


def test_a_setting_that_postgres_refuses_is_told_from_its_log(folder: Path) -> None:
    with pytest.raises(LocalServiceError, match="no_such_setting"):
        LocalPostgres(folder, options=["no_such_setting=1"]).start()
    with LocalPostgres(folder, options=QUICK) as postgres:
        assert postgres.is_running()


def test_valkey_keeps_its_messages_and_its_address_over_a_restart(folder: Path) -> None:
    with LocalValkey(folder) as first, redis.Redis.from_url(first.url) as client:
        client.lpush("queue", "message")
        url = first.url
    with LocalValkey(folder) as second, redis.Redis.from_url(second.url) as client:
        assert second.url == url
        assert client.lrange("queue", 0, -1) == [b"message"]
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("appendfsync") == {"appendfsync": "everysec"}


def test_valkey_wants_its_password_and_hides_it(folder: Path) -> None:
    with LocalValkey(folder) as valkey:
        address = valkey.url.rpartition("@")[2]
        with (
            redis.Redis.from_url(f"redis://{address}") as client,
            pytest.raises(redis.AuthenticationError),
        ):
            client.ping()
        assert (folder / "valkey.json").stat().st_mode & 0o077 == 0
        assert valkey.process is not None
        command = Path(f"/proc/{valkey.process.pid}/cmdline").read_bytes().decode()
        password = valkey.url.partition("redis://:")[2].partition("@")[0]
        assert password not in command


def test_valkey_moves_when_its_port_is_taken(folder: Path) -> None:
    with LocalValkey(folder) as valkey:
        url = valkey.url
    port = int(url.rpartition(":")[2].partition("/")[0])
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", port))
        squatter.listen()
        with LocalValkey(folder) as valkey:
            assert valkey.url != url


def test_other_commands_find_the_running_service(
    tmp_path: Path, settings_env: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_env(redis_url="redis://mine")
    monkeypatch.setenv("STILLHOUSE_DATABASE_URL", "registered for the undoing")
    monkeypatch.delenv("STILLHOUSE_DATABASE_URL")
    assert not apply_environment(tmp_path)
    found = {"STILLHOUSE_DATABASE_URL": "postgresql://up", "STILLHOUSE_REDIS_URL": "redis://up"}
    write_service(tmp_path, found)
    assert (tmp_path / "service.json").stat().st_mode & 0o077 == 0
    assert read_service(tmp_path) == found
    assert apply_environment(tmp_path)
    assert (get_settings().database_url, get_settings().redis_url) == (
        "postgresql://up",
        "redis://mine",
    )
    remove_service(tmp_path)
    assert read_service(tmp_path) == {}
