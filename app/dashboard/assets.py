"""Loads the files of the dashboard, compresses them, and names their version.

The URLs of all files but the page contain the version, which is a hash of all contents. So a
browser can keep the files, and a new version of the service never mixes with files of the old one.
"""

import gzip
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

FOLDER = Path(__file__).parent
PAGE = "index.html"
ENTRY = "js/main.js"
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
STATIC_IMPORT = re.compile(r'^(?:import|export)\b[^;]*?\bfrom\s*"(\.[^"]+)"', re.MULTILINE)
VENDORED_IMPORT = re.compile(r'\bfrom"(\./[^"]+)"')


@dataclass(frozen=True)
class Asset:
    """A file of the dashboard, plain and compressed by gzip. `etag` is a hash of its content."""

    media_type: str
    content: bytes
    zipped: bytes
    etag: str

    @classmethod
    def of(cls, name: str, content: bytes) -> "Asset":
        return cls(
            media_type=MEDIA_TYPES[PurePosixPath(name).suffix],
            content=content,
            zipped=gzip.compress(content, mtime=0),
            etag=f'"{hashlib.sha256(content).hexdigest()[:32]}"',
        )


@dataclass(frozen=True)
class Dashboard:
    """All files of the dashboard by their paths, the page, and the version of the files."""

    version: str
    page: Asset
    files: dict[str, Asset]


@lru_cache
def load() -> Dashboard:
    """Returns the dashboard, read from the disk once per process."""
    contents = {
        path.relative_to(FOLDER).as_posix(): path.read_bytes()
        for path in sorted(FOLDER.rglob("*"))
        if path.suffix in MEDIA_TYPES
    }
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    version = digest.hexdigest()[:16]
    page = contents.pop(PAGE).decode()
    links = "\n    ".join(
        f'<link rel="modulepreload" href="{{{{assets}}}}/{name}">'
        for name in needed_modules(contents)
    )
    page = page.replace("{{preloads}}", links).replace("{{assets}}", f"/dashboard/{version}")
    files = {name: Asset.of(name, content) for name, content in contents.items()}
    return Dashboard(version, Asset.of(PAGE, page.encode()), files)


def needed_modules(contents: dict[str, bytes]) -> list[str]:
    """Returns the modules that the entry imports, directly or not, except those loaded later.

    The page names them, so that a browser requests all of them at once.
    """
    found: dict[str, None] = {}
    waiting = [ENTRY]
    while waiting:
        name = waiting.pop(0)
        if name not in found:
            found[name] = None
            waiting.extend(imports_of(name, contents[name].decode()))
    return list(found)


def imports_of(name: str, source: str) -> Iterator[str]:
    """Yields the paths of the modules that a module imports statically."""
    pattern = VENDORED_IMPORT if name.startswith("vendor/") else STATIC_IMPORT
    for target in pattern.findall(source):
        parts: list[str] = []
        for part in (PurePosixPath(name).parent / target).parts:
            if part == "..":
                parts.pop()
            else:
                parts.append(part)
        yield "/".join(parts)
