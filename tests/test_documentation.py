"""The documentation as a whole: its links, its navigation and its site."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.documentation import DOCS, ROOT, anchors, links

PAGES = sorted(DOCS.rglob("*.md"))
WITH_LINKS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("examples/*/*.md"), *PAGES]
LOADED = re.compile(r"<(?:link|script|img|iframe)[^>]+(?:src|href)=[\"']?(?:https?:)?//")


def navigation(entry: object) -> list[str]:
    """Returns the paths in a part of the navigation."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    assert isinstance(parts, list) or hasattr(parts, "__iter__")
    return [path for part in parts for path in navigation(part)]


def broken_links(page: Path) -> list[str]:
    """Returns the links of a page to files or headings that do not exist."""
    broken = []
    for target in links(page.read_text()):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            broken.append(target)
    return broken


def test_every_link_leads_to_a_file_and_a_heading() -> None:
    broken = {str(page.relative_to(ROOT)): broken_links(page) for page in WITH_LINKS}
    assert {page: targets for page, targets in broken.items() if targets} == {}


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One `two`, three\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#one-two-three) [c](#here)\n## Here\n"
        "[d](other.md#none) [e](absent.md) [f](#none)\n```sh\n[g](absent.md)\n```\n"
    )
    assert broken_links(page) == ["other.md#none", "absent.md", "#none"]


def test_every_page_is_in_the_navigation_once() -> None:
    paths = navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(paths) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs .[docs]")
def test_the_site_is_built_without_warnings_and_loads_nothing_from_other_hosts(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    built = list(tmp_path.rglob("*.html"))
    assert len(built) > len(PAGES)  # with the page for a wrong URL
    assert LOADED.search('<link rel="stylesheet" href="https://fonts.example/css">')
    assert [page.name for page in built if LOADED.search(page.read_text())] == []
