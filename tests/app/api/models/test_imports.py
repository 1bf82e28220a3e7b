"""Uploads of models over real HTTP: refused at once, or a job that a real import process runs."""

import io
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from app.db import jobs
from app.db.session import transaction
from app.services import garbage_collector
from app.settings import Settings
from app.storage import store
from tests.app.api.conftest import Service, refusal
from tests.waiting import wait_for
from worker.jobs.supervisor import run_until_idle

Register = Callable[..., str]
Parts = list[tuple[str, tuple[str | None, Any]]]
URL = "/v1/models/imports"


def parts(folder: Path, name: str = "uploaded") -> Parts:
    files: Parts = [("name", (None, name))]
    return files + [("file", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]


def send(http: httpx.Client, files: Parts, **headers: str) -> httpx.Response:
    return http.post(URL, files=files, headers=headers)


def is_nothing_left() -> bool:
    staged = Path(store()._root) / ".incoming"
    return store().children("imports") == [] and list(staged.iterdir()) == []


@pytest.fixture
def done(http: httpx.Client) -> Callable[[httpx.Response], dict[str, Any]]:  # Any: JSON
    """A function that lets a real worker run the import, and returns its end."""

    def run(answer: httpx.Response) -> dict[str, Any]:
        assert answer.status_code == 200, answer.text
        assert answer.json()["status"] == "queued"
        assert run_until_idle("worker", lambda: False) == 1
        ended: dict[str, Any] = http.get(f"{URL}/{answer.json()['id']}").json()
        return ended

    return run


def archive_of(folder: Path) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as packed:
        packed.add(folder, "model")
    return content.getvalue()


def test_an_uploaded_archive_is_imported(
    http: httpx.Client, done: Callable[..., Any], tiny_llama_dir: Path
) -> None:
    content = archive_of(tiny_llama_dir)
    files: Parts = [("name", (None, "packed")), ("file", ("model.tar.gz", content))]
    ended = done(send(http, files))
    assert (ended["status"], ended["model"]) == ("succeeded", "packed"), ended["error"]
    listed = [file["name"] for file in http.get("/v1/models/packed/files").json()["data"]]
    assert "model.safetensors" in listed
    assert http.get("/v1/models/packed").json()["owned_by"] == "acme"
    garbage_collector.collect(store())
    assert store().children("imports") == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"name": None}, (400, "missing_required_parameter", "name")),
        ({"name": "Not A Name"}, (400, "invalid_value", "name")),
        ({"name": "x" * 300}, (400, "invalid_value", "name")),
        ({"file": {"pytorch_model.bin": b"x"}}, (400, "unsafe_file", "file")),
        ({"file": {"sub/config.json": b"x"}}, (400, "invalid_file", "file")),
        ({"file": {"../config.json": b"x"}}, (400, "invalid_file", "file")),
        ({"file": {"config.json": b""}}, (400, "invalid_file", "file")),
        ({"file": {"config.json": b"{}"}}, (400, "missing_file", "file")),
        ({"file": {"a.gguf": b"x", "config.json": b"{}"}}, (400, "invalid_file", "file")),
        ({"file": {}}, (400, "missing_required_parameter", "file")),
        ({"file": {"config.json": b"{}"}, "extra": b"1"}, (400, "unknown_parameter", "extra")),
    ],
)
def test_an_upload_that_cannot_be_a_model_is_refused_and_leaves_nothing(
    http: httpx.Client, changes: dict[str, Any], expected: tuple[int, str, str]
) -> None:
    files: Parts = []
    if (name := changes.get("name", "uploaded")) is not None:
        files.append(("name", (None, name)))
    sent = changes.get("file", {"config.json": b"{}"})
    files += [("file", (file, content)) for file, content in sent.items()]
    if "extra" in changes:
        files.append(("extra", (None, changes["extra"])))
    assert refusal(send(http, files)) == expected
    assert is_nothing_left()


def test_endless_headers_of_a_part_are_refused(http: httpx.Client) -> None:
    body = b"--b\r\n" + b"".join(b"x-%d: %s\r\n" % (i, b"y" * 100) for i in range(10_000))
    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = http.post(URL, content=body, headers=headers)
    assert refusal(answer) == (400, "invalid_file", "file")


def test_a_taken_name_is_refused_before_the_files_arrive(
    service: Service, http: httpx.Client, register: Register, tiny_llama_dir: Path
) -> None:
    register("tiny")
    assert refusal(send(http, parts(tiny_llama_dir, "tiny"))) == (409, "resource_in_use", "name")
    assert send(http, parts(tiny_llama_dir, "coming")).status_code == 200
    assert refusal(send(http, parts(tiny_llama_dir, "coming"))) == (409, "resource_in_use", "name")
    with service.http(service.new_key(scopes=["models:read"])) as reader:
        assert send(reader, parts(tiny_llama_dir)).status_code == 403
    with httpx.Client(base_url=service.url) as unknown:
        assert send(unknown, parts(tiny_llama_dir)).status_code == 401


def test_a_model_above_the_limit_is_refused(
    http: httpx.Client, settings_env: Callable[..., Settings], tiny_llama_dir: Path
) -> None:
    settings_env(max_import_bytes=100_000)
    assert refusal(send(http, parts(tiny_llama_dir))) == (413, "file_too_large", "file")
    assert is_nothing_left()
    settings_env(max_import_bytes=2**40, min_free_bytes=2**60)
    answer = send(http, parts(tiny_llama_dir))
    assert refusal(answer) == (503, "insufficient_storage", None)
    assert answer.headers["retry-after"]
    assert is_nothing_left()


def test_a_declared_length_above_the_limit_is_refused_before_the_body(service: Service) -> None:
    address = urlsplit(service.url)
    head = (
        f"POST {URL} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {service.new_key()}\r\n"
        "content-type: multipart/form-data; boundary=b\r\ncontent-length: 99999999999999\r\n\r\n"
    )
    with socket.create_connection((address.hostname or "", address.port or 0), 10) as connection:
        connection.sendall(head.encode())
        assert b" 413 " in connection.recv(1000)


def test_a_client_that_leaves_during_an_upload_leaves_nothing(
    service: Service, tiny_llama_dir: Path
) -> None:
    address = urlsplit(service.url)
    body = (
        b'--b\r\ncontent-disposition: form-data; name="name"\r\n\r\nuploaded\r\n'
        b'--b\r\ncontent-disposition: form-data; name="file"; filename="model.safetensors"\r\n\r\n'
    ) + b"x" * 3_000_000
    head = (
        f"POST {URL} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {service.new_key()}\r\n"
        "content-type: multipart/form-data; boundary=b\r\ncontent-length: 9000000\r\n\r\n"
    )
    staged = Path(store()._root) / ".incoming"
    with socket.create_connection((address.hostname or "", address.port or 0), 10) as connection:
        connection.sendall(head.encode() + body)
        wait_for(lambda: list(staged.iterdir()), 10, "nothing is written")
    wait_for(is_nothing_left, 10, "something is left")


def test_a_repeated_upload_with_an_idempotency_key_is_one_import(
    http: httpx.Client, tiny_llama_dir: Path
) -> None:
    headers = {"Idempotency-Key": "once"}
    first, second = (send(http, parts(tiny_llama_dir), **headers) for _ in range(2))
    assert first.json() == second.json()
    assert second.headers["idempotent-replayed"] == "true"
    assert store().children("imports") == [first.json()["id"]]
    changed: Parts = [*parts(tiny_llama_dir), ("file", ("README.md", b"other"))]
    assert send(http, changed, **headers).status_code == 422
    with transaction() as session:
        assert jobs.count_active(session, "acme") == 1


def test_an_upload_to_a_remote_store_is_complete(
    http: httpx.Client, settings_env: Callable[..., Settings], tiny_llama_dir: Path
) -> None:
    settings_env(store_url="memory://uploads")
    answer = send(http, parts(tiny_llama_dir))
    assert answer.status_code == 200
    assert store().verify_folder(f"imports/{answer.json()['id']}")
    store().delete("imports")


def test_a_gguf_file_is_staged_alone(http: httpx.Client) -> None:
    files: Parts = [("name", (None, "g")), ("file", ("tiny.gguf", b"GGUF" * 100))]
    answer = send(http, files)
    assert answer.status_code == 200
    with transaction() as session:
        row = jobs.load_job(session, answer.json()["id"])
        assert row is not None
        staged = row.spec["staged"]
    assert (row.spec["format"], staged["bytes"]) == ("gguf", 400)
    with store().open(staged["key"]) as file:
        assert file.read() == b"GGUF" * 100
