"""`stillhouse models pull` against the real API, and against a proxy that breaks connections."""

import contextlib
import fcntl
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.commands.model_downloads import Pull, read_listing
from app.commands.remote_service import Address, RemoteError, RemoteService, find_address
from app.local_copies import lock_path
from app.settings import Settings
from tests.app.api.conftest import Service, register, service

__all__ = ["register", "service"]  # fixtures
Register = Callable[..., str]


class CuttingProxy:
    """Forwards connections to the API, and closes each after `num_bytes` bytes of its response."""

    def __init__(self, port: int, num_bytes: int) -> None:
        self.port, self.num_bytes, self.num_connections = port, num_bytes, 0
        self.requests: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        self.num_connections += 1
        with client, socket.create_connection(("127.0.0.1", self.port)) as server:
            threading.Thread(target=self._up, args=(client, server), daemon=True).start()
            num_left = self.num_bytes
            while num_left and (piece := server.recv(min(65536, num_left))):
                client.sendall(piece)
                num_left -= len(piece)
            for end in (client, server):  # `close` alone does not end the other thread's `recv`
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        try:
            while piece := client.recv(65536):
                self.requests.append(piece)
                server.sendall(piece)
        except OSError:
            return


@pytest.fixture
def remote(service: Service) -> Iterator[RemoteService]:
    with RemoteService(Address(f"{service.url}/v1", service.new_key())) as connected:
        yield connected


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def pull(remote: RemoteService, target: Path, model: str = "tiny") -> list[str]:
    lines: list[str] = []
    Pull(remote, target, lines.append, line_seconds=0.0).run(model)
    return lines


def test_a_pulled_folder_is_the_model(
    remote: RemoteService, register: Register, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    register("tiny")
    lines = pull(remote, tmp_path / "new" / "model")
    assert contents(tmp_path / "new" / "model") == contents(tiny_llama_dir)
    assert any("model.safetensors: complete" in line for line in lines)
    assert any("(100%)" in line for line in lines)


def test_files_in_subfolders_and_aliases_are_pulled(
    remote: RemoteService, register: Register, tmp_path: Path
) -> None:
    (tmp_path / "model" / "templates").mkdir(parents=True)
    (tmp_path / "model" / "templates" / "tool.jinja").write_text("{{ a }}")
    register("tiny", folder=tmp_path / "model")
    remote.http.put("/v1/models/support/aliases/prod", json={"model": "tiny"})
    pull(remote, tmp_path / "out", "support@prod")
    assert contents(tmp_path / "out") == {"templates/tool.jinja": b"{{ a }}"}


def test_a_pull_survives_a_connection_that_is_cut_again_and_again(
    service: Service, register: Register, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    register("tiny")
    size = (tiny_llama_dir / "model.safetensors").stat().st_size
    proxy = CuttingProxy(int(service.url.rpartition(":")[2]), size // 5)
    with RemoteService(Address(proxy.url, service.new_key())) as remote:
        pull(remote, tmp_path / "out")
    proxy.close()
    assert contents(tmp_path / "out") == contents(tiny_llama_dir)
    assert proxy.num_connections > 5
    assert any(b"range: bytes=" in request for request in proxy.requests)


def test_an_interrupted_pull_continues_where_it_stopped(
    service: Service,
    remote: RemoteService,
    register: Register,
    tiny_llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.commands.model_downloads.MAX_FAILURES", 1)
    register("tiny")
    weights = (tiny_llama_dir / "model.safetensors").read_bytes()
    part = tmp_path / "out" / "model.safetensors.part"
    part.parent.mkdir()
    part.write_bytes(weights[:100_001])
    proxy = CuttingProxy(int(service.url.rpartition(":")[2]), 2**40)
    with RemoteService(Address(proxy.url, service.new_key())) as through:
        pull(through, tmp_path / "out")
    proxy.close()
    assert any(b"range: bytes=100001-" in request for request in proxy.requests)
    assert contents(tmp_path / "out") == contents(tiny_llama_dir)
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert not any("complete" in line for line in pull(remote, tmp_path / "out"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == first


@pytest.mark.parametrize("leftover", [b"x" * 1000, b"x" * 10_000_000, b""])
def test_a_partial_file_of_another_model_is_replaced(
    remote: RemoteService,
    register: Register,
    tiny_llama_dir: Path,
    tmp_path: Path,
    leftover: bytes,
) -> None:
    register("tiny")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors.part").write_bytes(leftover)
    pull(remote, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tiny_llama_dir)


def test_a_file_with_other_content_is_not_overwritten(
    remote: RemoteService, register: Register, tmp_path: Path
) -> None:
    register("tiny")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")
    with pytest.raises(RemoteError, match="choose another folder"):
        pull(remote, tmp_path / "out")
    assert contents(tmp_path / "out") == {"config.json": b"mine"}


def test_damaged_bytes_are_never_renamed(
    remote: RemoteService, register: Register, tmp_path: Path, settings_env: Callable[..., Settings]
) -> None:
    register("tiny")
    stored = settings_env().data_dir / "store" / "models" / "tiny" / "config.json"
    stored.write_bytes(stored.read_bytes()[::-1])
    with pytest.raises(RemoteError, match="another SHA-256"):
        pull(remote, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_refusal_is_shown_in_the_words_of_the_service(
    service: Service, remote: RemoteService, register: Register, tmp_path: Path
) -> None:
    with pytest.raises(RemoteError, match="does not exist"):
        pull(remote, tmp_path / "out", "gone")
    assert not (tmp_path / "out").exists()
    with (
        RemoteService(Address(service.url, "sk-sh-none")) as stranger,
        pytest.raises(RemoteError, match="malformed"),
    ):
        pull(stranger, tmp_path)
    with (
        RemoteService(Address("http://127.0.0.1:9", "k")) as away,
        pytest.raises(RemoteError, match="is the service running"),
    ):
        pull(away, tmp_path)


def test_only_one_pull_writes_to_a_folder(
    remote: RemoteService, register: Register, tmp_path: Path
) -> None:
    register("tiny")
    target = tmp_path / "out"
    target.mkdir()
    lock = lock_path(target, fcntl.LOCK_EX)
    assert lock is not None
    with pytest.raises(RemoteError, match="another process"):
        pull(remote, target)
    assert list(target.iterdir()) == []
    os.close(lock)
    assert pull(remote, target)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../b", "", "a\\b/..", ".bashrc", "x.part"]
)
def test_a_listing_with_an_unsafe_name_is_refused(name: str) -> None:
    entry = {"name": name, "bytes": 1, "sha256": "0" * 64}
    with pytest.raises(RemoteError, match="refused"):
        read_listing({"data": [entry]})


def test_a_disk_that_is_too_small_is_found_before_the_download(
    remote: RemoteService, register: Register, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register("tiny")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(RemoteError, match="free space"):
        pull(remote, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_operators_key_is_sent_to_this_machine_only(
    settings_env: Callable[..., Settings],
) -> None:
    settings = settings_env()
    settings.data_dir.mkdir(parents=True)
    (settings.data_dir / "api_key").write_text("sk-sh-operator\n")
    assert find_address(settings, None, None).key == "sk-sh-operator"
    assert find_address(settings, "http://localhost:8400/v1", None).key == "sk-sh-operator"
    with pytest.raises(RemoteError, match="STILLHOUSE_API_KEY"):
        find_address(settings, "https://stillhouse.example", None)
    with pytest.raises(RemoteError, match="is not a URL"):
        find_address(settings, "stillhouse.example", "k")
