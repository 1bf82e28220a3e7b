"""The files of the dashboard: vendored libraries, syntax, imports and limits."""

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from app.dashboard.assets import FOLDER

AXE_FOLDER = Path(__file__).parents[2] / "dashboard" / "axe"
MAX_FILE_LINES = 400
OUR_FILES = [
    path
    for path in sorted(FOLDER.rglob("*"))
    if path.suffix in (".js", ".css", ".html") and "vendor" not in path.parts
]
MODULES = [path for path in OUR_FILES if path.suffix == ".js" and path.name != "theme.js"]
IMPORT = re.compile(r'[}\w]\s*\bfrom ?"([^"\n]+)"|\bimport\("([^"\n]+)"\)')
NODE = shutil.which("node")

# Parses each module.
PARSE_ALL = """
const fs = require("fs"), vm = require("vm");
for (const path of process.argv.slice(1)) new vm.SourceTextModule(fs.readFileSync(path, "utf8"), {identifier: path});
"""


@pytest.mark.parametrize("folder", [FOLDER / "vendor", AXE_FOLDER], ids=["vendor", "axe"])
def test_vendored_files_have_their_hashes_and_licences(folder: Path) -> None:
    entries = json.loads((folder / "vendor.json").read_text())
    for entry in entries:
        digest = hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest()
        assert digest == entry["sha256"], entry["file"]
        assert len((folder / entry["licence_file"]).read_text()) > 500
        assert entry["version"]
        assert entry["licence"]
    files = {path.name for path in folder.iterdir() if path.suffix in (".js", ".css")}
    assert files == {entry["file"] for entry in entries}


def test_no_file_is_longer_than_its_budget() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in OUR_FILES}
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_every_import_is_a_relative_path_to_a_file() -> None:
    for path in [*MODULES, *(FOLDER / "vendor").glob("*.js")]:
        for static, dynamic in IMPORT.findall(path.read_text()):
            target = static or dynamic
            assert target.startswith("."), (path.name, target)
            assert (path.parent / target).resolve().is_file(), (path.name, target)


def test_no_file_names_another_host() -> None:
    urls_by_file = {
        path.name: urls
        for path in OUR_FILES
        if (urls := re.findall(r"https?://(?!www\.w3\.org/2000/svg)[^\s\"'`$]+", path.read_text()))
    }
    assert urls_by_file == {}


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_every_module_parses() -> None:
    command = [NODE or "", "--experimental-vm-modules", "-e", PARSE_ALL, *map(str, MODULES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
