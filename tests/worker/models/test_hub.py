"""`hf:` imports against a hub on the loopback that speaks the routes huggingface_hub uses."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from worker.errors import HubFailed, MissingFile
from worker.models.hub import fetch_from_hub
from worker.protocol.run_lines import ErrorLine, ResultLine, RunLine, run_line

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one repository, org/tiny, at one commit with the branch `main`."""

    daemon_threads = True

    def __init__(self, folder: Path, token: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder, self.token, self.fetched = folder, token, list[str]()
        self.is_gated = self.is_broken = False
        self.announces_at_most = 2**60

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if self.server.is_broken:
            return self.refuse(500, "")
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.refuse(
                403 if self.server.is_gated else 401,
                "GatedRepo" if self.server.is_gated else "RepoNotFound",
            )
        match parts:
            case ["api", "models", "org", "tiny", "revision", revision]:
                return (
                    self.send_info()
                    if revision in ("main", COMMIT)
                    else self.refuse(404, "RevisionNotFound")
                )
            case ["org", "tiny", "resolve", revision, *rest] if revision in ("main", COMMIT):
                return self.send_file("/".join(rest))
        return self.refuse(404, "RepoNotFound")

    def send_info(self) -> None:
        files = [path for path in sorted(self.server.folder.rglob("*")) if path.is_file()]
        siblings = [
            {
                "rfilename": path.relative_to(self.server.folder).as_posix(),
                "size": min(path.stat().st_size, self.server.announces_at_most),
                "blobId": "0" * 40,
            }
            for path in files
        ]
        document = {
            "id": "org/tiny",
            "modelId": "org/tiny",
            "sha": COMMIT,
            "private": False,
            "siblings": siblings,
        }
        self.send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def send_file(self, name: str) -> None:
        path = self.server.folder / name
        if not path.is_file():
            return self.refuse(404, "EntryNotFound")
        if self.command == "GET":
            self.server.fetched.append(name)
        content = path.read_bytes()
        return self.send(
            200,
            content,
            {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"},
        )

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (
            {"X-Repo-Commit": COMMIT, "Content-Length": str(len(content))} | headers
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(tiny_llama_dir: Path, tmp_path: Path) -> Iterator[Hub]:
    folder = Path(shutil.copytree(tiny_llama_dir, tmp_path / "repository"))
    (folder / "README.md").write_text("---\nlicense: mit\n---\na card")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02never to be fetched")
    (folder / "modeling_tiny.py").write_text("raise SystemExit('never to be fetched')")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"never to be fetched")
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(hub: Hub, folder: Path, source: str = "org/tiny@main", token: str | None = None) -> str:
    return fetch_from_hub(
        source, folder, endpoint=hub.url, token=token, on_progress=lambda done, total: None
    )


def test_only_the_files_of_a_model_are_fetched_and_byte_for_byte(hub: Hub, tmp_path: Path) -> None:
    assert fetch(hub, tmp_path / "in") == COMMIT
    names = {path.name for path in (tmp_path / "in").iterdir()}
    assert names == set(hub.fetched)
    assert "README.md" in names, "it names the licence"
    assert names == {path.name for path in hub.folder.iterdir()} - {
        "pytorch_model.bin",
        "modeling_tiny.py",
        "onnx",
    }
    for name in names:
        assert (tmp_path / "in" / name).read_bytes() == (hub.folder / name).read_bytes()


def test_progress_ends_with_every_byte(hub: Hub, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    fetch_from_hub(
        "org/tiny",
        tmp_path / "in",
        endpoint=hub.url,
        token=None,
        on_progress=lambda *pair: seen.append(pair),
    )
    total = sum(path.stat().st_size for path in (tmp_path / "in").iterdir())
    assert seen[-1] == (total, total)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("org/other@main", "no model org/other"),
        ("org/tiny@v9", "no revision v9"),
        ("tiny", "org/name@revision"),
        ("../../etc@main", "org/name@revision|no model"),
        ("org/tiny/more@main", "org/name@revision"),
    ],
)
def test_what_is_not_there_is_said(hub: Hub, tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(HubFailed, match=message):
        fetch(hub, tmp_path / "in", source)


def test_a_private_model_needs_the_token(hub: Hub, tmp_path: Path) -> None:
    hub.token = "hf_secret"
    with pytest.raises(HubFailed, match="STILLHOUSE_HF_TOKEN"):
        fetch(hub, tmp_path / "without")
    assert fetch(hub, tmp_path / "with", token="hf_secret") == COMMIT
    hub.is_gated = True
    with pytest.raises(HubFailed, match="gated"):
        fetch(hub, tmp_path / "gated")


def test_a_repository_of_pickles_only_is_refused_and_nothing_is_fetched(
    hub: Hub, tmp_path: Path
) -> None:
    (hub.folder / "model.safetensors").unlink()
    with pytest.raises(MissingFile, match="safetensors"):
        fetch(hub, tmp_path / "in")
    assert hub.fetched == []


def test_a_hub_that_delivers_more_than_it_announces_does_not_fill_the_disk(
    hub: Hub, tmp_path: Path
) -> None:
    with (hub.folder / "vocab.json").open("wb") as file:
        file.truncate(8 * 2**20)
    hub.announces_at_most = 1000
    with pytest.raises(HubFailed, match="larger than the hub declares"):
        fetch(hub, tmp_path / "in")
    assert (
        sum(path.stat().st_size for path in (tmp_path / "in").rglob("*") if path.is_file())
        < 4 * 2**20
    )


def test_a_hub_that_fails_or_is_away_is_a_reason(hub: Hub, tmp_path: Path) -> None:
    hub.is_broken = True
    with pytest.raises(HubFailed, match="cannot be downloaded"):
        fetch(hub, tmp_path / "in")
    with pytest.raises(HubFailed, match="cannot be downloaded"):
        fetch_from_hub(
            "org/tiny",
            tmp_path / "in2",
            endpoint="http://127.0.0.1:9",
            token=None,
            on_progress=lambda *_: None,
        )


def run_process(hub: Hub, out: Path, source: str) -> tuple[int, list[RunLine]]:
    out.with_suffix(".json").write_text(
        json.dumps({"format": "hub", "hub": source, "num_threads": 1})
    )
    environment: dict[str, Any] = dict(os.environ) | {
        "STILLHOUSE_HF_ENDPOINT": hub.url,
        "OMP_NUM_THREADS": "1",
    }
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HOME": str(out.parent / "hf")}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "worker.import_model",
            str(out.with_suffix(".json")),
            "--out",
            str(out),
        ],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    return done.returncode, [run_line.validate_json(line) for line in done.stdout.splitlines()]


def test_the_process_imports_from_the_hub_and_keeps_the_commit(hub: Hub, tmp_path: Path) -> None:
    status, lines = run_process(hub, tmp_path / "out", "org/tiny@main")
    assert status == 0
    result = lines[-1]
    assert isinstance(result, ResultLine)
    assert result.result["source"] == {
        "format": "hub",
        "hub": "org/tiny@main",
        "commit": COMMIT,
        "license": "mit",
    }
    assert (tmp_path / "out" / result.folder / "model.safetensors").exists()
    status, lines = run_process(hub, tmp_path / "out2", "org/gone@main")
    assert status == 1
    assert isinstance(lines[-1], ErrorLine)
    assert lines[-1].code == "hub_failed"
