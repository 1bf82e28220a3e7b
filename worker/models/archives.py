"""Unpacks an uploaded tar or zip file with the files of a model. Nothing in it is trusted."""

import errno
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from app.contracts.model_files import refusal_of
from worker.errors import BrokenFile, UnsafeFile

MAX_MEMBERS = 2000
MAX_HEADER_BYTES = 64 * 2**10  # of a long name; tarfile reads it into memory
LONG_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
PIECE_BYTES = 2**20
# Errors of the libraries for a damaged archive.
DAMAGES = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    ValueError,  # an offset before the file, or a name that is not UTF-8
    NotImplementedError,
)


def unpack(archive: Path, target: Path, *, max_bytes: int) -> Path:
    """Writes the files of the archive into the new folder `target`, and returns it.

    All files must be in one folder of the archive, whose path is dropped. Hidden files are skipped.

    Raises:
        UnsafeFile: A member is a link or a special file, has a refused name, or is in another
            folder. Or the files have more than `max_bytes` bytes.
        BrokenFile: The archive is damaged.
    """
    target.mkdir(parents=True)
    num_bytes, parents = 0, set[PurePosixPath]()
    try:
        for path, size, content in _members(archive):
            name = _checked_name(path)
            num_bytes += size
            if num_bytes > max_bytes:
                raise UnsafeFile(f"the files in the archive have more than {max_bytes:,} bytes")
            if name.startswith("."):
                continue
            parents.add(path.parent)
            if len(parents) > 1:
                raise UnsafeFile("the archive has files in several folders; put them into one")
            if (reason := refusal_of(name)) is not None:
                raise UnsafeFile(reason)
            if (target / name).exists():
                raise UnsafeFile(f"the archive has two files {name}")
            _write(content, target / name, size)
    except (*DAMAGES, OSError) as error:
        # bz2 raises OSError without a number, and a seek before the file gives EINVAL
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise BrokenFile(f"the archive cannot be read: {error}; pack the files again") from error
    if not parents:
        raise BrokenFile("the archive has no files; pack the files of a model folder")
    return target


class _Header(tarfile.TarInfo):
    """Header of a tar file. The length of a long name is limited."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in LONG_HEADERS and self.size > MAX_HEADER_BYTES:
            raise UnsafeFile("a header in the archive is too long; shorten the names of its files")
        member: tarfile.TarInfo = super()._proc_member(tar)  # type: ignore[misc]  # no public hook
        return member


def _members(archive: Path) -> Iterator[tuple[PurePosixPath, int, IO[bytes]]]:
    """Yields the path, size and content of each file.

    Raises UnsafeFile for links and devices, and if there are more than `MAX_MEMBERS` members.
    """
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for number, info in enumerate(opened.infolist()):
                _check_number(number)
                if info.flag_bits & 1:
                    raise UnsafeFile("the archive is encrypted; pack the files without a password")
                kind = info.external_attr >> 28
                if kind not in (0, 4, 8):  # unknown, folder, regular file
                    raise UnsafeFile(f"{info.filename[:100]} in the archive is not a regular file")
                if not info.is_dir():
                    with opened.open(info) as content:
                        yield PurePosixPath(info.filename), info.file_size, content
        return
    # Read as a stream, so that the headers of a damaged file cannot cause seeks.
    with tarfile.open(archive, "r|*", tarinfo=_Header) as stream:
        for number, member in enumerate(stream):
            _check_number(number)
            if member.isdir():
                continue
            content_or_none = stream.extractfile(member) if member.isreg() else None
            if content_or_none is None or member.issparse():
                raise UnsafeFile(f"{member.name[:100]} in the archive is not a regular file")
            yield PurePosixPath(member.name), member.size, content_or_none


def _check_number(number: int) -> None:
    if number >= MAX_MEMBERS:
        raise UnsafeFile(
            f"the archive has more than {MAX_MEMBERS:,} members; pack only the model's files"
        )


def _checked_name(path: PurePosixPath) -> str:
    if path.is_absolute() or ".." in path.parts or "\\" in str(path) or not path.name:
        raise UnsafeFile(f"the archive has a file with the path {str(path)[:100]!r}")
    return path.name


def _write(content: IO[bytes], target: Path, size: int) -> None:
    """Copies exactly `size` bytes. Raises BrokenFile if the content is shorter or longer."""
    num_left = size
    with target.open("xb") as file:
        while piece := content.read(PIECE_BYTES):
            num_left -= len(piece)
            if num_left < 0:
                break
            file.write(piece)
    if num_left:
        raise BrokenFile(f"{target.name} in the archive does not have the size that it declares")
