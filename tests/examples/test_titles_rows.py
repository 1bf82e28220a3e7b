"""Changelog entries become rows of prose, each once, and no package has rows on both sides."""

import gzip
import shutil
import subprocess
from pathlib import Path

import pytest

from examples.titles import prepare_rows
from examples.titles.prepare_rows import Entry, as_prose, fitting, parse_changelog, split_by_package

CHANGELOG = """\
argon2 (0~20190702+dfsg-4) unstable; urgency=medium

  [ Ada Lovelace ]
  * QA upload.
  * d/rules: Restore threading support
    to the udeb (closes: #1034696):
    - for amd64
    + and arm64.

 -- Ada Lovelace <ada@example.org>  Fri, 24 Mar 2023 10:00:00 +0100

argon2 (0~20190702+dfsg-3) unstable; urgency=low

  * Rebuild -- with a dash.

 -- Ada Lovelace <ada@example.org>  Fri, 03 Mar 2023 10:00:00 +0100
"""


def text_of(word: str, length: int = 150) -> str:
    return (f"{word} " * length)[:length]


def entries_of(num_packages: int, each: int) -> list[Entry]:
    return [
        Entry(f"package{p}", text_of(f"p{p}e{e}")) for p in range(num_packages) for e in range(each)
    ]


def test_an_entry_is_one_line_without_bullets_names_and_trailer() -> None:
    assert list(parse_changelog(CHANGELOG)) == [
        Entry(
            "argon2",
            "QA upload; d/rules: Restore threading support to the udeb (closes: #1034696): for amd64; and arm64",
        ),
        Entry("argon2", "Rebuild -- with a dash"),
    ]


def test_text_before_the_first_bullet_is_kept() -> None:
    assert as_prose("  Initial release\n  of it\n  * Really.") == "Initial release of it; Really"


def test_a_text_that_two_packages_share_is_kept_once_in_whatever_order_they_come() -> None:
    shared = text_of("same")
    entries = [Entry("zlib", shared), Entry("bash", shared), Entry("bash", text_of("other"))]
    expected = [Entry("bash", text_of("other")), Entry("bash", shared)]
    assert fitting(entries) == expected
    assert fitting(reversed(entries)) == expected


@pytest.mark.parametrize(
    ("length", "is_kept"), [(119, False), (120, True), (400, True), (401, False)]
)
def test_only_entries_of_the_right_length_are_kept(length: int, is_kept: bool) -> None:
    assert (fitting([Entry("bash", "x" * length)]) != []) == is_kept


def test_no_package_has_rows_on_both_sides() -> None:
    entries = entries_of(40, 10)
    training, held_out = split_by_package(entries, num_train=200, num_valid=50)
    assert (len(training), len(held_out)) == (200, 50)
    assert {e.package for e in training}.isdisjoint(e.package for e in held_out)
    assert len({e.package for e in held_out}) >= 50 / prepare_rows.MAX_HELD_OUT_PER_PACKAGE


def test_the_split_is_the_same_every_time_and_hardly_moved_by_one_more_package() -> None:
    entries = entries_of(40, 4)
    before = split_by_package(entries, num_train=1000, num_valid=40)
    assert split_by_package(entries, num_train=1000, num_valid=40) == before
    _, after = split_by_package(
        [*entries, *(Entry("new", text_of(f"n{i}")) for i in range(4))],
        num_train=1000,
        num_valid=40,
    )
    moved = {e.package for e in after} ^ {e.package for e in before[1]}
    assert len(moved) <= 2


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_changelogs_are_read_out_of_package_files(tmp_path: Path) -> None:
    root = tmp_path / "root"
    doc = root / "usr/share/doc/argon2"
    doc.mkdir(parents=True)
    (doc / "changelog.Debian.gz").write_bytes(gzip.compress(CHANGELOG.encode()))
    (doc / "changelog.gz").write_bytes(gzip.compress(b"upstream's own"))
    package = tmp_path / "argon2_1_all.deb"
    write_deb(root, package)
    assert list(prepare_rows.archived_changelogs(package)) == [CHANGELOG]


def write_deb(root: Path, package: Path) -> None:
    (root / "DEBIAN").mkdir()
    control = (
        "Package: argon2\nVersion: 1\nArchitecture: all\nMaintainer: A <a@b.c>\nDescription: x\n"
    )
    (root / "DEBIAN" / "control").write_text(control)
    subprocess.run(
        ["dpkg-deb", "--build", str(root), str(package)], check=True, capture_output=True
    )


def test_too_few_entries_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "doc" / "argon2"
    installed.mkdir(parents=True)
    (installed / "changelog.Debian.gz").write_bytes(gzip.compress(CHANGELOG.encode()))
    monkeypatch.setattr(prepare_rows, "INSTALLED", tmp_path / "doc")
    monkeypatch.setattr(prepare_rows, "PACKAGES", [])
    with pytest.raises(prepare_rows.TooFewEntries, match="apt-get update"):
        prepare_rows.collect(tmp_path / "debs", num_train=10, num_valid=2, is_fetching=False)
