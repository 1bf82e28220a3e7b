"""Archives of models: unpacked, or refused before they do harm."""

import io
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from worker.errors import BrokenFile, UnsafeFile
from worker.models.archives import MAX_HEADER_BYTES, MAX_MEMBERS, unpack

Pack = Callable[[dict[str, bytes]], bytes]


def tar(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as packed:  # type: ignore[call-overload]  # a mode of several
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            packed.addfile(info, io.BytesIO(data))
    return content.getvalue()


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as packed:
        for name, data in files.items():
            packed.writestr(name, data)
    return content.getvalue()


def with_damaged_content(archive: bytes) -> bytes:
    """A zip file in which the bytes of the first member are overwritten."""
    start = archive.index(b"config.json") + len("config.json") + 9  # after the header of LZMA
    return archive[:start] + b"\xff" * 40 + archive[start + 40 :]


def opened(tmp_path: Path, content: bytes, max_bytes: int = 10**6) -> dict[str, bytes]:
    path = tmp_path / "archive"
    path.write_bytes(content)
    folder = unpack(path, tmp_path / "out", max_bytes=max_bytes)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


PLAIN = {"config.json": b"{}", "model.safetensors": b"w" * 1000}


@pytest.mark.parametrize("pack", [tar, zipped, lambda files: tar(files, "w:xz")])
@pytest.mark.parametrize("prefix", ["", "./", "model/", "deep/er/"])
def test_the_files_of_one_folder_are_unpacked(tmp_path: Path, pack: Pack, prefix: str) -> None:
    files = {f"{prefix}{name}": data for name, data in PLAIN.items()}
    hidden = {f"{prefix}.DS_Store": b"x", "__MACOSX/._config.json": b"x"}
    assert opened(tmp_path, pack({**files, **hidden})) == PLAIN


@pytest.mark.parametrize("pack", [tar, zipped])
@pytest.mark.parametrize(
    "name",
    ["../config.json", "/etc/config.json", "a/../../config.json", "model.pkl", "run.py", "a.exe"],
)
def test_a_path_outside_or_a_refused_name_is_refused(tmp_path: Path, pack: Pack, name: str) -> None:
    with pytest.raises(UnsafeFile):
        opened(tmp_path, pack({name: b"x"}))
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("pack", [tar, zipped])
def test_two_folders_in_an_archive_are_refused(tmp_path: Path, pack: Pack) -> None:
    with pytest.raises(UnsafeFile, match="several folders"):
        opened(tmp_path, pack({"config.json": b"{}", "onnx/config.json": b"{}"}))


@pytest.mark.parametrize("pack", [tar, zipped])
def test_an_archive_that_unpacks_to_too_much_is_refused_before_it_is_written(
    tmp_path: Path, pack: Pack
) -> None:
    bomb = pack({"model.safetensors": bytes(50 * 10**6)})
    assert len(bomb) < 10**5
    with pytest.raises(UnsafeFile, match="more than"):
        opened(tmp_path, bomb)
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) == 0


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as packed:
        info = tarfile.TarInfo("config.json")
        info.type, info.linkname = kind, "/etc/passwd"
        packed.addfile(info)
    with pytest.raises(UnsafeFile, match="regular file"):
        opened(tmp_path, content.getvalue())


def test_a_link_in_a_zip_file_is_refused(tmp_path: Path) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as packed:
        info = zipfile.ZipInfo("config.json")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        packed.writestr(info, "/etc/passwd")
    with pytest.raises(UnsafeFile, match="regular file"):
        opened(tmp_path, content.getvalue())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nothing",
        tar({"config.json": os.urandom(5000)})[:2000],
        tar(PLAIN, "w")[:700],
        zipped(PLAIN)[:-30],
        tar({}),
        with_damaged_content(zipped({"config.json": os.urandom(500)})),
        with_damaged_content(zipped({"config.json": os.urandom(500)}, zipfile.ZIP_BZIP2)),
        with_damaged_content(zipped({"config.json": os.urandom(500)}, zipfile.ZIP_LZMA)),
    ],
    ids=["empty", "text", "cut-gzip", "cut-tar", "cut-zip", "no-files", "zip", "bzip2", "lzma"],
)
def test_a_damaged_or_empty_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(BrokenFile):
        opened(tmp_path, content)


def test_a_name_that_is_too_long_is_refused_before_it_is_read(tmp_path: Path) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as packed:
        packed.addfile(tarfile.TarInfo("a" * (2 * MAX_HEADER_BYTES)))
    with pytest.raises(UnsafeFile, match="header"):
        opened(tmp_path, content.getvalue())


def test_folders_count_as_members(tmp_path: Path) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as packed:
        for number in range(MAX_MEMBERS + 1):
            folder = tarfile.TarInfo(f"d{number}")
            folder.type = tarfile.DIRTYPE
            packed.addfile(folder)
    with pytest.raises(UnsafeFile, match="members"):
        opened(tmp_path, content.getvalue())
