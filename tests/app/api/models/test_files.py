"""Listing and downloading the files of models, over real HTTP."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import httpx
import pytest

from app.api.models.file_ranges import find_span
from app.db import checkpoints, jobs, leases
from app.db.session import transaction
from app.settings import Settings
from app.storage import store
from tests.app.api.conftest import Service, refusal

Register = Callable[..., str]
URL = "/v1/models/tiny/files"
WEIGHTS = f"{URL}/model.safetensors"


@pytest.fixture
def weights(tiny_llama_dir: Path) -> bytes:
    return (tiny_llama_dir / "model.safetensors").read_bytes()


@pytest.fixture(params=["local", "remote"])
def tiny(
    request: pytest.FixtureRequest,
    settings_env: Callable[..., Settings],
    register: Register,
) -> Iterator[str]:
    """The model `tiny` in a folder, and in an fsspec file system that is not local."""
    if request.param == "remote":
        settings_env(store_url="memory://model-files")
    yield register("tiny")
    if request.param == "remote" and store().exists("models"):
        fsspec.filesystem("memory").rm("/model-files", recursive=True)


def test_the_files_of_a_model_are_listed_with_size_and_hash(
    http: httpx.Client, tiny: str, tiny_llama_dir: Path
) -> None:
    listed = http.get(URL).json()
    contents = {path.name: path.read_bytes() for path in sorted(tiny_llama_dir.iterdir())}
    assert listed == {
        "object": "list",
        "data": [
            {
                "object": "model.file",
                "name": name,
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
            for name, content in contents.items()
        ],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }
    assert "model.safetensors" in contents


def test_every_listed_file_can_be_downloaded(http: httpx.Client, tiny: str) -> None:
    for file in http.get(URL).json()["data"]:
        answer = http.get(f"{URL}/{file['name']}")
        assert answer.status_code == 200
        assert answer.headers["content-length"] == str(file["bytes"]) == str(len(answer.content))
        assert answer.headers["etag"] == f'"{file["sha256"]}"'
        assert answer.headers["accept-ranges"] == "bytes"
        assert hashlib.sha256(answer.content).hexdigest() == file["sha256"]


def test_a_file_in_a_subfolder_can_be_downloaded(
    http: httpx.Client, register: Register, tmp_path: Path
) -> None:
    (tmp_path / "model" / "templates").mkdir(parents=True)
    (tmp_path / "model" / "templates" / "tool.jinja").write_text("{{ a }}")
    register("tiny", folder=tmp_path / "model")
    assert [file["name"] for file in http.get(URL).json()["data"]] == ["templates/tool.jinja"]
    assert http.get(f"{URL}/templates/tool.jinja").text == "{{ a }}"


def test_an_interrupted_download_is_resumed(http: httpx.Client, tiny: str, weights: bytes) -> None:
    begin = bytearray()
    with http.stream("GET", WEIGHTS) as answer:
        etag = answer.headers["etag"]
        for piece in answer.iter_raw(10_000):
            begin += piece
            break  # the client closes the connection
    assert 0 < len(begin) < len(weights)
    rest = http.get(WEIGHTS, headers={"range": f"bytes={len(begin)}-", "if-range": etag})
    assert rest.status_code == 206
    assert rest.headers["content-range"] == f"bytes {len(begin)}-{len(weights) - 1}/{len(weights)}"
    assert rest.headers["content-length"] == str(len(weights) - len(begin))
    assert rest.headers["etag"] == etag
    assert bytes(begin) + rest.content == weights


def test_a_download_begins_anew_if_the_model_was_replaced(
    http: httpx.Client, register: Register, tmp_path: Path
) -> None:
    config = tmp_path / "model" / "config.json"
    config.parent.mkdir()
    config.write_text("old")
    register("tiny", folder=config.parent)
    etag = http.get(f"{URL}/config.json").headers["etag"]
    assert http.delete("/v1/models/tiny").status_code == 200
    config.write_text("new!")
    register("tiny", folder=config.parent)
    headers = {"range": "bytes=2-", "if-range": etag}
    answer = http.get(f"{URL}/config.json", headers=headers)
    assert (answer.status_code, answer.text) == (200, "new!")
    headers["if-range"] = answer.headers["etag"]
    answer = http.get(f"{URL}/config.json", headers=headers)
    assert (answer.status_code, answer.text) == (206, "w!")


def test_a_part_in_the_middle_or_at_the_end_can_be_downloaded(
    http: httpx.Client, tiny: str, weights: bytes
) -> None:
    size = len(weights)
    for requested, first, last in [
        ("bytes=0-0", 0, 0),
        ("bytes=100-300099", 100, 300_099),
        ("bytes=-7", size - 7, size - 1),
        (f"bytes=-{size + 1}", 0, size - 1),
        (f"bytes=5-{size + 1000}", 5, size - 1),
    ]:
        answer = http.get(WEIGHTS, headers={"range": requested})
        last = min(last, size - 1)
        assert answer.status_code == 206, requested
        assert answer.headers["content-range"] == f"bytes {first}-{last}/{size}"
        assert answer.headers["content-length"] == str(last - first + 1)
        assert answer.content == weights[first : last + 1]


def test_a_range_after_the_end_is_refused_with_the_size_of_the_file(
    http: httpx.Client, tiny: str, weights: bytes
) -> None:
    for requested in (
        f"bytes={len(weights)}-",
        f"bytes={len(weights) + 5}-{len(weights) + 9}",
        "bytes=-0",
    ):
        answer = http.get(WEIGHTS, headers={"range": requested})
        assert refusal(answer) == (416, "range_not_satisfiable", "range")
        assert answer.headers["content-range"] == f"bytes */{len(weights)}"


def test_a_range_that_cannot_be_used_gives_the_complete_file(
    http: httpx.Client, register: Register, weights: bytes
) -> None:
    register("tiny")
    for headers in (
        {"range": "bytes=0-1,5-6"},
        {"range": "bytes=5-2"},
        {"range": "bytes=-"},
        {"range": "bytes=a-b"},
        {"range": "bytes=" + "9" * 5000 + "-"},
        {"range": "rows=0-1"},
        {"range": "bytes=0-1", "if-range": '"another-etag"'},
        {"range": "bytes=99999999-", "if-range": '"another-etag"'},
        {"range": "bytes=0-1", "if-range": "Sat, 28 Nov 2026 12:00:00 GMT"},
    ):
        answer = http.get(WEIGHTS, headers=headers)
        assert answer.status_code == 200, headers
        assert "content-range" not in answer.headers
        assert answer.content == weights


def test_no_range_of_an_empty_file_can_be_satisfied() -> None:
    assert [find_span(requested, 0) for requested in ("bytes=0-", "bytes=0-5", "bytes=-5")] == [
        range(0),
        range(0),
        range(0),
    ]
    assert find_span(None, 0) is None


def test_files_are_visible_where_their_model_is(service: Service, register: Register) -> None:
    register("tiny")
    register("shared", project_id=None)
    with service.http() as own, service.http(service.new_key("rival")) as stranger:
        own.put("/v1/models/support/aliases/prod", json={"model": "tiny"})
        for route in ("files", "files/config.json"):
            for model_id, status in (("tiny", 404), ("support@prod", 404), ("shared", 200)):
                assert own.get(f"/v1/models/{model_id}/{route}").status_code == 200
                answer = stranger.get(f"/v1/models/{model_id}/{route}")
                assert answer.status_code == status
                if status == 404:
                    assert refusal(answer) == (404, "model_not_found", "model")
    with service.http(service.new_key(scopes=["files:read"])) as narrow:
        assert narrow.get(URL).status_code == 403
        assert narrow.get(WEIGHTS).status_code == 403
    with httpx.Client(base_url=service.url) as unknown:
        assert unknown.get(WEIGHTS).status_code == 401


def test_a_name_that_is_not_listed_does_not_exist(http: httpx.Client, register: Register) -> None:
    register("tiny")
    traversals = ("..%2f..%2fpepper", "%2fetc%2fpasswd", "..\\pepper")
    for name in ("missing.json", "_manifest.json", "", *traversals):
        answer = http.get(f"{URL}/{name}")
        assert refusal(answer) == (404, "resource_not_found", "file_name"), name
        assert "GET /v1/models/tiny/files" in answer.json()["error"]["message"]


def test_lost_bytes_are_not_found(http: httpx.Client, tiny: str) -> None:
    store().delete("models/tiny/config.json")
    lost = http.get(f"{URL}/config.json")
    assert refusal(lost) == (404, "resource_not_found", "file_name")
    assert "no longer in the store" in lost.json()["error"]["message"]
    store().delete("models/tiny")
    for url in (URL, WEIGHTS):
        assert refusal(http.get(url)) == (404, "resource_not_found", "model")


def test_a_head_request_gives_the_headers_of_the_download(http: httpx.Client, tiny: str) -> None:
    download, head = http.get(WEIGHTS), http.head(WEIGHTS)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-length", "etag", "accept-ranges", "content-type"):
        assert head.headers[name] == download.headers[name]
    part = http.head(WEIGHTS, headers={"range": "bytes=10-19"})
    assert (part.status_code, part.headers["content-length"]) == (206, "10")
    assert http.head(f"{URL}/missing.json").status_code == 404


def test_a_download_in_progress_survives_the_deletion_of_the_model(
    http: httpx.Client, register: Register, tmp_path: Path
) -> None:
    content = bytes(range(256)) * 2**16  # more than the sockets hold
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(content)
    register("tiny", folder=tmp_path / "model")
    with http.stream("GET", WEIGHTS) as answer:
        pieces = answer.iter_raw()
        begin = next(pieces)
        assert http.delete("/v1/models/tiny").status_code == 200
        assert begin + b"".join(pieces) == content
    assert http.get(WEIGHTS).status_code == 404


def test_the_files_of_a_checkpoint_can_be_downloaded(
    http: httpx.Client, register: Register, tmp_path: Path
) -> None:
    register("tiny")
    (tmp_path / "step" / "model").mkdir(parents=True)
    (tmp_path / "step" / "trainer.json").write_text("not of the model")
    (tmp_path / "step" / "model" / "config.json").write_text("{}")
    with transaction() as session:
        job = jobs.insert_job(
            session, id="ftjob-1", project_id="acme", kind="distillation", spec={}, model_id="ds:a"
        )
        claimed = leases.claim(session, "worker/1", 90.0)
        assert claimed is not None
        assert claimed.lease_token is not None
        key = f"checkpoints/{job.id}/{claimed.lease_token}/step-10"
        ref = store().put_folder(tmp_path / "step", key)
        checkpoints.insert_checkpoint(
            session, job.id, claimed.lease_token, step=10, ref=ref, metrics={}, is_best=True
        )
    url = "/v1/models/ds:a:ckpt-step-10/files"
    assert [file["name"] for file in http.get(url).json()["data"]] == ["config.json"]
    assert http.get(f"{url}/config.json").text == "{}"
    assert http.get(f"{url}/trainer.json").status_code == 404
    assert http.get("/v1/models/ds:a:ckpt-step-10/card").status_code == 404
