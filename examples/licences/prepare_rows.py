"""`python -m examples.licences.prepare_rows OUT`: licence notices, each with the class of its licence.

The notices are the rules of ScanCode Toolkit (its data is under CC-BY-4.0), read from its wheel without
installing it. A rule names the licence of a notice, and each licence has a category.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.commands.demo import DemoFailed

REQUIREMENT = "scancode-toolkit-mini==32.5.0"
CLASS_OF = {
    "Permissive": "permissive",
    "Copyleft": "copyleft",
    "Copyleft Limited": "weak copyleft",
    "Commercial": "restricted",
    "Proprietary Free": "restricted",
    "Free Restricted": "restricted",
    "Source-available": "restricted",
    "Public Domain": "public domain",
}
CLASSES = ("permissive", "copyleft", "weak copyleft", "restricted", "public domain")
INSTRUCTION = "Name the licence class of the notice."
MIN_CHARACTERS, MAX_CHARACTERS = 60, 400
LIKE = 50  # letters: notices that begin with the same ones are on the same side
MAX_ALIKE = 8
NUM_TEST, NUM_VALID = 1000, 200
NUM_FEW = 60  # validation notices for jobs without a gate, whose evaluations would take minutes
SEPARATOR = re.compile(r"\s+(?:AND|OR|WITH)\s+|[()\s]+")


@dataclass(frozen=True)
class Notice:
    """The text of a notice and the class of its licence."""

    text: str
    label: str

    def row(self, *, is_answered: bool = True) -> str:
        """Returns the notice as a line of a training file."""
        messages = [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": self.text},
            {"role": "assistant", "content": self.label},
        ]
        return json.dumps({"messages": messages if is_answered else messages[:2]}) + "\n"


def read_notices(wheel: Path) -> list[Notice]:
    """Returns the notices of the wheel whose licences are all of one class."""
    with zipfile.ZipFile(wheel) as archive:
        files = {
            name: archive.read(name).decode()
            for name in archive.namelist()
            if name.endswith((".LICENSE", ".RULE"))
        }
    categories = {}
    for name, content in files.items():
        if name.endswith(".LICENSE"):
            key, category = field(content, "key"), field(content, "category")
            if key and category:
                categories[key] = category
    rules = (content for name, content in sorted(files.items()) if name.endswith(".RULE"))
    return [notice for content in rules if (notice := notice_of(content, categories))]


def notice_of(rule: str, categories: dict[str, str]) -> Notice | None:
    """Returns the notice of a rule, or None if it is of another kind or has no single class."""
    parts = rule.split("---", 2)
    expression = field(rule, "license_expression")
    if len(parts) < 3 or not expression:
        return None
    if "is_license_notice: yes" not in parts[1] and "is_license_text: yes" not in parts[1]:
        return None
    keys = {key for key in SEPARATOR.split(expression) if key and key not in ("AND", "OR", "WITH")}
    classes = {CLASS_OF.get(categories.get(key, "")) for key in keys}
    text = shortened(" ".join(re.sub(r"\{\{|\}\}", "", parts[2]).split()))
    (label, *others) = classes
    if others or label is None or len(text) < MIN_CHARACTERS or not text.isascii():
        return None
    return Notice(text, label)


def field(content: str, name: str) -> str | None:
    """Returns a field of the YAML header of a file."""
    found = re.search(rf"^{name}: (.*)$", content, re.MULTILINE)
    return found[1].strip() if found else None


def shortened(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS].rsplit(" ", 1)[0]


def split(notices: Iterable[Notice]) -> tuple[list[Notice], list[Notice], list[Notice]]:
    """Returns training, validation and test notices.

    Notices that begin alike are on one side, because many rules differ in a few words only. At most
    `MAX_ALIKE` of them are used, and equal ones only once.
    """
    groups: dict[str, dict[str, Notice]] = {}
    for notice in notices:
        letters = re.sub(r"[^a-z]+", "", notice.text.lower())
        groups.setdefault(letters[:LIKE], {}).setdefault(letters, notice)
    training: list[Notice] = []
    valid: list[Notice] = []
    test: list[Notice] = []
    for beginning in sorted(groups, key=shuffled):
        side = test if len(test) < NUM_TEST else valid if len(valid) < NUM_VALID else training
        alike = sorted(groups[beginning].values(), key=lambda notice: shuffled(notice.text))
        side.extend(alike[:MAX_ALIKE])
    return training, valid, test


def shuffled(text: str) -> str:
    """Returns a sort key that puts texts into a random but constant order."""
    return hashlib.sha256(text.encode()).hexdigest()


def fetch(folder: Path) -> Path:
    """Returns the wheel, downloaded into the folder unless it is there. Raises DemoFailed."""
    pattern = "scancode_toolkit_mini-32.5.0-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps"]
        command += ["--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
        if subprocess.run(command, check=False).returncode != 0:
            raise DemoFailed(f"{REQUIREMENT} could not be downloaded; see the error above")
    (wheel,) = folder.glob(pattern)
    return wheel


def write_rows(folder: Path, num_labelled: int, num_unlabelled: int) -> None:
    """Writes the files of the task. Training notices beyond the two numbers are not used.

    `prompts.jsonl` has the labelled notices without their labels, and the unlabelled ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    training, valid, test = split(read_notices(fetch(folder)))
    training.sort(key=lambda notice: shuffled(notice.text))
    labelled = training[:num_labelled]
    parts: dict[str, Sequence[Notice]] = {"labelled": labelled, "valid": valid, "test": test}
    parts["few"] = valid[:NUM_FEW]
    for name, notices in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(notice.row() for notice in notices))
    prompts = training[: num_labelled + num_unlabelled]
    lines = "".join(notice.row(is_answered=False) for notice in prompts)
    (folder / "prompts.jsonl").write_text(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.licences.prepare_rows")
    parser.add_argument("out", type=Path)
    parser.add_argument("--labelled", type=int, default=1000)
    parser.add_argument("--unlabelled", type=int, default=1000)
    arguments = parser.parse_args()
    write_rows(arguments.out, arguments.labelled, arguments.unlabelled)


if __name__ == "__main__":
    main()
