"""`stillhouse` as it is typed: the whole service in one terminal, and the commands that find it."""

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from app.local.embedded_servers import free_port
from tests.waiting import wait_for

QUICK = {
    "STILLHOUSE_HEARTBEAT_SECONDS": "0.5",
    "STILLHOUSE_RECONCILE_SECONDS": "0.5",
    "STILLHOUSE_MIN_FREE_BYTES": "1000000",
    "STILLHOUSE_NUM_THREADS": "1",
}


def environment(**extra: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("STILLHOUSE_")} | QUICK | extra


def run_cli(*words: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app.commands.cli", *words],
        env=environment(**extra),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


class Up:
    """One `stillhouse up`."""

    def __init__(self, data_dir: Path, *, is_awaited: bool = True, **extra: str) -> None:
        self.data_dir, self.port = data_dir, free_port()
        data_dir.mkdir(exist_ok=True)
        self.log = data_dir / "up.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "app.commands.cli",
                    "up",
                    "--data-dir",
                    str(data_dir),
                    "--port",
                    str(self.port),
                ],
                env=environment(**extra),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        if is_awaited:
            wait_for(self.is_ready)

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.get("/health/ready").status_code == 200
        except (httpx.TransportError, FileNotFoundError):
            return False

    def get(self, path: str) -> httpx.Response:
        key = (self.data_dir / "api_key").read_text().strip()
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", headers=headers, timeout=5)

    def cli(self, *words: str) -> subprocess.CompletedProcess[str]:
        return run_cli(*words, "--data-dir", str(self.data_dir))

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def processes_of(self, words: str) -> list[psutil.Process]:
        found = []
        for process in self.family():
            with contextlib.suppress(psutil.Error):  # it may end while we look
                line = process.cmdline()
                if words in " ".join(line) and "app.parent_death" not in line:
                    found.append(process)
        return found

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(100)


@pytest.fixture(scope="module")
def up(service_dir: Path) -> Iterator[Up]:
    service = Up(service_dir / "cli")
    yield service
    service.stop()


def test_the_first_start_makes_a_key_that_only_the_owner_can_read_and_that_works(up: Up) -> None:
    for name in ("api_key", "pepper", "service.json"):
        assert stat.S_IMODE((up.data_dir / name).stat().st_mode) == 0o600
    assert up.get("/v1/models").status_code == 200
    wait_for(lambda: f"http://127.0.0.1:{up.port}" in up.log.read_text())


def test_keys_are_made_listed_and_revoked(up: Up) -> None:
    key = up.cli("keys", "create", "--project", "p2", "--scopes", "models:read").stdout.split()[-1]
    url, headers = f"http://127.0.0.1:{up.port}/v1/models", {"Authorization": f"Bearer {key}"}
    assert httpx.get(url, headers=headers).status_code == 200
    assert key.split("-")[2] in up.cli("keys", "list").stdout
    assert up.cli("keys", "revoke", key.split("-")[2]).returncode == 0
    assert httpx.get(url, headers=headers).status_code == 401
    tenant = up.cli("keys", "create", "--project", "p2").stdout.split()[-1]
    tenant_headers = {"Authorization": f"Bearer {tenant}"}
    assert httpx.get(url, headers=tenant_headers).status_code == 200
    metrics = f"http://127.0.0.1:{up.port}/metrics"
    assert httpx.get(metrics, headers=tenant_headers).status_code == 403
    assert up.get("/metrics").status_code == 200
    unknown = up.cli("keys", "revoke", "nobody")
    assert (unknown.returncode, "no such key" in unknown.stderr) == (1, True)
    wrong = up.cli("keys", "create", "--project", "p2", "--scopes", "everything")
    assert (wrong.returncode, "jobs:read" in wrong.stderr) == (1, True)


def test_a_folder_is_imported_listed_and_seen_over_http(up: Up, tiny_llama_dir: Path) -> None:
    done = up.cli("models", "import", str(tiny_llama_dir), "--name", "tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tiny" in up.cli("models", "list").stdout
    assert "tiny" in [model["id"] for model in up.get("/v1/models").json()["data"]]
    again = up.cli("models", "import", str(tiny_llama_dir), "--name", "tiny")
    assert (again.returncode, "taken" in again.stderr) == (1, True)


def test_an_import_that_is_refused_ends_1_with_the_reason(
    up: Up, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    for file in tiny_llama_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    done = up.cli("models", "import", str(folder), "--name", "evil")
    assert (done.returncode, "pytorch_model.bin" in done.stderr) == (1, True)
    for source in (str(tmp_path), str(tmp_path / "absent"), "hf:nobody", "hf:../..@main"):
        done = up.cli("models", "import", source, "--name", "none")
        assert (done.returncode, "stillhouse: " in done.stderr) == (1, True), source
    assert "evil" not in up.cli("models", "list").stdout


@pytest.mark.parametrize(
    "words", ["worker.main train", "worker.main serve", "app.commands.cli api"]
)
def test_a_process_that_is_killed_is_started_again(up: Up, words: str) -> None:
    wait_for(lambda: up.processes_of(words))
    (killed,) = up.processes_of(words)
    killed.kill()
    wait_for(lambda: [p.pid for p in up.processes_of(words)] not in ([], [killed.pid]))
    wait_for(up.is_ready)


@pytest.mark.parametrize("words", ["valkey-server", "bin/postgres"])
def test_a_database_that_is_killed_is_started_again(up: Up, words: str) -> None:
    up.processes_of(words)[0].kill()
    wait_for(lambda: f"{words.split('/')[-1].split('-')[0]} has exited" in up.log.read_text())
    wait_for(lambda: up.get("/v1/models").status_code == 200)


def test_a_second_one_in_the_same_folder_or_on_the_same_port_says_why_not(
    up: Up, tmp_path: Path
) -> None:
    second = up.cli("up", "--port", str(free_port()))
    assert (second.returncode, "stop it first" in second.stderr) == (1, True)
    taken = run_cli("up", "--data-dir", str(tmp_path / "other"), "--port", str(up.port))
    assert (taken.returncode, "choose another" in taken.stderr) == (1, True)


def test_without_a_service_a_command_says_what_to_do(tmp_path: Path) -> None:
    done = run_cli("models", "list", "--data-dir", str(tmp_path))
    assert (done.returncode, "stillhouse up" in done.stderr) == (1, True)
    away = run_cli("keys", "list", STILLHOUSE_DATABASE_URL="postgresql://u:p@127.0.0.1:9/none")
    assert (away.returncode, "does not answer" in away.stderr) == (1, True)


def test_models_and_keys_outlive_a_restart_and_a_kill_leaves_nothing_running(
    service_dir: Path, tiny_llama_dir: Path
) -> None:
    service = Up(service_dir / "outlives")
    try:
        assert (
            service.cli("models", "import", str(tiny_llama_dir), "--name", "tiny").returncode == 0
        )
        key = (service_dir / "outlives" / "api_key").read_text()
        family = service.family()
        assert service.stop() == 0, service.log.read_text()
        assert [p for p in family if p.is_running()] == []
        assert not (service_dir / "outlives" / "service.json").exists()

        service = Up(service_dir / "outlives")
        assert (service_dir / "outlives" / "api_key").read_text() == key
        assert [model["id"] for model in service.get("/v1/models").json()["data"]] == ["tiny"]
        family = service.family()
        service.stop(signal.SIGKILL)
        wait_for(lambda: not any(p.is_running() and p.status() != "zombie" for p in family))

        service = Up(service_dir / "outlives")
        assert [model["id"] for model in service.get("/v1/models").json()["data"]] == ["tiny"]
    finally:
        service.stop()


def test_the_url_is_printed_when_both_workers_are_alive(service_dir: Path) -> None:
    service = Up(service_dir / "alive", is_awaited=False)
    try:
        wait_for(lambda: "is up at" in service.log.read_text())
        assert service.get("/health/ready").json()["serve_workers"] == 1
        assert "worker_ready" in (service.data_dir / "logs" / "train-worker-1.log").read_text()
    finally:
        service.stop()


def torch_that(does: str, folder: Path) -> dict[str, str]:
    """Variables that put another `torch` first on the path: only serve workers import it."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text(does)
    return {"PYTHONPATH": str(folder)}


def test_a_serve_worker_that_cannot_start_ends_it_with_the_path_of_its_log(
    service_dir: Path, tmp_path: Path
) -> None:
    broken = torch_that("raise ImportError('no such library')", tmp_path)
    service = Up(service_dir / "broken", is_awaited=False, **broken)
    assert service.process.wait(100) == 1
    told = service.log.read_text()
    assert "is up at" not in told
    assert (
        str(service.data_dir / "logs" / "serve-worker-1.log") in told.partition("stillhouse: ")[2]
    )
    assert "ImportError: no such library" in told


def test_ctrl_c_ends_it_while_a_worker_is_awaited(service_dir: Path, tmp_path: Path) -> None:
    slow = torch_that("import time; time.sleep(600)", tmp_path)
    service = Up(service_dir / "slow", is_awaited=False, **slow)
    try:
        wait_for(lambda: "A train worker is ready" in service.log.read_text())
        assert service.stop() == 0
        assert "is up at" not in service.log.read_text()
    finally:
        service.stop(signal.SIGKILL)


def test_the_command_line_leaves_torch_out() -> None:
    code = "import json, sys, app.commands.cli, app.commands.up; print(json.dumps([m for m in ('torch', 'transformers') if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_a_shell_completes_commands_without_loading_heavy_libraries() -> None:
    code = """
import atexit, sys
import app.commands.cli
heavy = {"torch", "sqlalchemy", "httpx", "celery", "redis", "psycopg", "fsspec"}
atexit.register(lambda: print(sorted(heavy & sys.modules.keys())))
app.commands.cli.main()
"""
    typed = {"_STILLHOUSE_COMPLETE": "complete_bash", "COMP_WORDS": "stillhouse jobs cr"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(**typed, COMP_CWORD="2"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["create", "[]"]
