"""Reads the licence that the model card of a model names."""

import re
from pathlib import Path

import yaml

FRONT_MATTER = re.compile(rb"\A\s*---\r?\n(.*?)\r?\n---", re.DOTALL)
MAX_BYTES = 64 * 2**10
MAX_LICENSES = 8
LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+()-]{0,99}")


def license_of(folder: Path) -> str | None:
    """Returns the `license` in the front matter of README.md, or None if it names none.

    A licence with the value `other` is returned by its `license_name`.
    """
    path = folder / "README.md"
    if path.is_symlink() or not path.is_file():
        return None
    with path.open("rb") as file:
        match = FRONT_MATTER.match(file.read(MAX_BYTES))
    try:
        matter = yaml.safe_load(match[1]) if match else None
    except Exception:  # noqa: BLE001  # a card may have tags whose constructors raise anything
        return None
    if not isinstance(matter, dict):
        return None
    named = matter.get("license")
    if named == "other":
        named = matter.get("license_name") or named
    if isinstance(named, list):
        is_plain = len(named) <= MAX_LICENSES and all(isinstance(name, str) for name in named)
        named = " and ".join(named) if is_plain else None
    return checked_license(named)


def checked_license(named: object) -> str | None:
    """Returns the name of a licence, or None if it is not a short name."""
    return named if isinstance(named, str) and LICENSE.fullmatch(named) else None
