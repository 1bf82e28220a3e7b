"""What an upload leaves when its disk or its database fails it: bytes with a row, or nothing."""

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from app.auth import Principal
from app.db.session import DatabaseUnavailable
from app.errors import QuotaExceeded, Unavailable
from app.services.files import Upload, get_file, read_content
from app.settings import Settings, get_settings
from app.storage import store

MIB = 2**20
HEAD = (
    b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n'
    b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
)
TAIL = b"\r\n--x--\r\n"


@pytest.fixture
def begin(database: str, settings_env: Callable[..., Settings]) -> Callable[[], Upload]:
    """A function that begins an upload under the settings of then."""
    settings_env(min_free_bytes=0)

    def do_begin() -> Upload:
        principal = Principal("p", "key", frozenset())
        return Upload(principal, "multipart/form-data; boundary=x", get_settings())

    return do_begin


def stored() -> list[str]:
    """Names of all files in the store, half-written ones too."""
    return sorted(
        path.name for path in Path(get_settings().store_root()).rglob("*") if path.is_file()
    )


def test_bytes_stay_when_the_answer_to_the_commit_is_lost(
    begin: Callable[[], Upload], monkeypatch: pytest.MonkeyPatch
) -> None:
    upload, commit = begin(), psycopg.Connection.commit
    upload.feed(HEAD + b"anything" + TAIL)

    def lose(connection: psycopg.Connection[Any]) -> None:  # Any: rows, of which there are none
        commit(connection)
        connection.close()
        raise psycopg.OperationalError("the answer is lost")

    with monkeypatch.context() as network:
        network.setattr(psycopg.Connection, "commit", lose)
        with pytest.raises(DatabaseUnavailable):
            upload.finish()
    assert b"".join(read_content(get_file("p", upload.id))) == b"anything"


def test_an_upload_that_is_refused_in_the_end_leaves_no_bytes(
    begin: Callable[[], Upload], settings_env: Callable[..., Settings]
) -> None:
    settings_env(max_files_per_project=1)
    first, second = begin(), begin()
    for upload in (first, second):
        upload.feed(HEAD + b"anything" + TAIL)
    first.finish()
    with pytest.raises(QuotaExceeded):
        second.finish()
    assert stored() == [first.id]


def test_a_disk_that_others_fill_meanwhile_takes_no_more_of_a_file(
    begin: Callable[[], Upload], settings_env: Callable[..., Settings], tmp_path: Path
) -> None:
    settings_env(min_free_bytes=(store().free_bytes() or 0) - 64 * MIB)
    upload = begin()
    upload.feed(HEAD + b"any")
    assert upload.fault is None
    with (tmp_path / "ballast").open("wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, 128 * MIB)
    upload.feed(b"thing" + TAIL)
    (tmp_path / "ballast").unlink()
    with pytest.raises(Unavailable) as refused:
        upload.finish()
    assert refused.value.code == "insufficient_storage"
    assert stored() == []


@pytest.mark.parametrize("num_bytes", [3_000, 30_000], ids=["at its end", "midway"])
def test_a_file_that_does_not_fit_is_refused_for_now_and_leaves_nothing(
    begin: Callable[[], Upload], num_bytes: int
) -> None:
    upload, (soft, hard) = begin(), resource.getrlimit(resource.RLIMIT_FSIZE)
    # a write beyond it fails as one to a full disk does
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    try:
        upload.feed(HEAD)
        for _ in range(num_bytes // 1000):  # in pieces that its buffer takes in
            upload.feed(b"x" * 1000)
        upload.feed(TAIL)
        with pytest.raises(Unavailable) as refused:
            upload.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.value.code == "storage_error"
    assert stored() == []
