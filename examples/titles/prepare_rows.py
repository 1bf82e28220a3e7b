"""`python -m examples.titles.prepare_rows OUT`: entries of Debian changelogs, as rows to train on and rows held out.

Debian machines carry the changelogs of what is installed in /usr/share/doc; images that strip them still have apt, which
fetches a fixed list of packages whose files hold them. No package has rows on both sides.
"""

import argparse
import gzip
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

INSTALLED = Path("/usr/share/doc")
CHANGELOG = re.compile(r"(?:^|/)usr/share/doc/[^/]+/changelog\.Debian(?:\.\w+)?\.gz$")
HEADER = re.compile(r"\s*(\S+) \([^)\s]+\) [^\n]*\n")
TRAILER = re.compile(r"^ -- .*$", re.MULTILINE)
BULLET = re.compile(r"[*+-]\s+")
MAINTAINER = re.compile(r"\[.*\]")  # a heading over what one person changed
MIN_CHARACTERS, MAX_CHARACTERS = 120, 400
MAX_HELD_OUT_PER_PACKAGE = 6
APT_OPTIONS = ("-qq", "-o", "APT::Sandbox::User=root")  # its own user may not write to our folder
# Small, with many entries, and in every Debian of these years; unknown ones are left out.
PACKAGES = (Path(__file__).parent / "packages.txt").read_text().split()


class TooFewEntries(Exception):
    """This machine does not give enough changelog entries; the message says what to do."""


@dataclass(frozen=True)
class Entry:
    """What one version changed, as one line of text, and the source package it belongs to."""

    package: str
    text: str


def parse_changelog(content: str) -> Iterator[Entry]:
    """The entries of a Debian changelog, newest first."""
    for block in TRAILER.split(content):
        if header := HEADER.match(block):
            yield Entry(header[1], as_prose(block[header.end() :]))


def as_prose(body: str) -> str:
    """The changes of an entry, one after the other, without bullets and names: what the teacher titles best."""
    changes: list[str] = []
    for line in body.splitlines():
        text = " ".join(line.split())
        if not text or MAINTAINER.fullmatch(text):
            continue
        if bullet := BULLET.match(text):
            changes.append(text[bullet.end() :])
        elif changes:
            changes[-1] += f" {text}"
        else:
            changes.append(text)
    return "; ".join(change.removesuffix(".") for change in changes).replace(":; ", ": ")


def fitting(entries: Iterable[Entry]) -> list[Entry]:
    """Those of the right length, each text once; in one order, whichever order they came in."""
    wanted = {e for e in entries if MIN_CHARACTERS <= len(e.text) <= MAX_CHARACTERS}
    first: dict[str, Entry] = {}
    for entry in sorted(wanted, key=lambda e: (e.package, e.text)):
        first.setdefault(entry.text, entry)
    return list(first.values())


def split_by_package(
    entries: Iterable[Entry], *, num_train: int, num_valid: int
) -> tuple[list[Entry], list[Entry]]:
    """At most so many entries to train on and to hold out, of different packages.

    Packages go to the held-out side in the order of their names' hashes until it has enough, so a few more packages on
    a machine move few entries. It takes a few entries of each, and the rest of that package is left out.
    """
    by_package: dict[str, list[Entry]] = {}
    for entry in entries:
        by_package.setdefault(entry.package, []).append(entry)
    held_out: list[Entry] = []
    training: list[Entry] = []
    for package in sorted(by_package, key=_digest):
        if len(held_out) < num_valid:
            held_out += _sample(by_package[package], MAX_HELD_OUT_PER_PACKAGE)
        else:
            training += by_package[package]
    return _sample(training, num_train), _sample(held_out, num_valid)


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _sample(entries: list[Entry], size: int) -> list[Entry]:
    return random.Random(0).sample(entries, min(size, len(entries)))


def installed_changelogs() -> Iterator[str]:
    for path in sorted(INSTALLED.glob("*/changelog.Debian*.gz")):
        yield gzip.decompress(path.read_bytes()).decode(errors="replace")


def fetched_changelogs(cache: Path) -> Iterator[str]:
    """The changelogs inside the package files of PACKAGES, fetched by apt into the cache unless they are there."""
    cache.mkdir(parents=True, exist_ok=True)
    known = set()
    if shutil.which("apt-get") and shutil.which("dpkg-deb"):
        done = subprocess.run(
            ["apt-cache", "pkgnames"], capture_output=True, text=True, check=False
        )
        known = set(done.stdout.split())
    # apt fetches none of a list with an unknown name in it.
    if wanted := [p for p in PACKAGES if p in known and not any(cache.glob(f"{p}_*.deb"))]:
        subprocess.run(["apt-get", *APT_OPTIONS, "download", *wanted], cwd=cache, check=False)
    for path in sorted(cache.glob("*.deb")):
        yield from archived_changelogs(path)


def archived_changelogs(package: Path) -> Iterator[str]:
    """The changelogs inside a package file, which is not installed."""
    with tempfile.TemporaryFile() as tar:
        subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=tar, check=True)
        tar.seek(0)
        with tarfile.open(fileobj=tar) as archive:
            for member in archive:
                if (
                    member.isfile()
                    and CHANGELOG.search(member.name)
                    and (file := archive.extractfile(member))
                ):
                    yield gzip.decompress(file.read()).decode(errors="replace")


def collect(
    cache: Path, *, num_train: int, num_valid: int, is_fetching: bool
) -> tuple[list[Entry], list[Entry]]:
    """Rows to train on and to hold out: of this machine's changelogs and, where they are too few, of fetched ones."""
    found = [entry for content in installed_changelogs() for entry in parse_changelog(content)]
    training, held_out = split_by_package(fitting(found), num_train=num_train, num_valid=num_valid)
    if is_fetching or len(training) < num_train or len(held_out) < num_valid:
        print(
            f"Too few entries in {INSTALLED}; fetching {len(PACKAGES)} packages (70 MB) to {cache}"
        )
        found += [
            entry for content in fetched_changelogs(cache) for entry in parse_changelog(content)
        ]
        training, held_out = split_by_package(
            fitting(found), num_train=num_train, num_valid=num_valid
        )
    if len(training) < num_train or len(held_out) < num_valid:
        raise TooFewEntries(
            f"there are {len(training):,} and {len(held_out):,} rows, {num_train:,} and {num_valid:,} are wanted. This "
            f"needs a Debian machine with changelogs in {INSTALLED}, or with apt-get, dpkg-deb and a list of packages "
            "(apt-get update); or ask for fewer with --train and --held-out"
        )
    return training, held_out


def write_rows(path: Path, entries: Iterable[Entry]) -> int:
    lines = [json.dumps({"input": entry.text}, ensure_ascii=False) + "\n" for entry in entries]
    path.write_text("".join(lines))
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.titles.prepare_rows")
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--train", type=int, default=1600, help="rows to train on; default: %(default)s"
    )
    parser.add_argument(
        "--held-out", type=int, default=120, help="rows held out; default: %(default)s"
    )
    parser.add_argument(
        "--cache", type=Path, help="where fetched packages are kept; default: OUT/debs"
    )
    parser.add_argument(
        "--fetch", action="store_true", help="fetch packages even if this machine has enough"
    )
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    try:
        training, held_out = collect(
            arguments.cache or out / "debs",
            num_train=arguments.train,
            num_valid=arguments.held_out,
            is_fetching=arguments.fetch,
        )
    except TooFewEntries as problem:
        sys.exit(f"prepare_rows: {problem}")
    for name, entries in (("train", training), ("valid", held_out)):
        path = out / f"{name}.jsonl"
        num_packages = len({entry.package for entry in entries})
        print(f"{path}: {write_rows(path, entries):,} rows, of {num_packages} packages")


if __name__ == "__main__":
    main()
