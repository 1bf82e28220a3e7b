"""The files of the dashboard: vendored libraries, syntax, limits, and how they are served."""

import gzip
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.api.dashboard.pages import POLICY
from app.dashboard.assets import FOLDER, load
from app.main import create_app
from app.settings import Settings

AXE_FOLDER = Path(__file__).parent / "axe"
MAX_FILE_LINES = 400
OUR_FILES = [
    path
    for path in sorted(FOLDER.rglob("*"))
    if path.suffix in (".js", ".css", ".html") and "vendor" not in path.parts
]
MODULES = [path for path in OUR_FILES if path.suffix == ".js" and path.name != "theme.js"]
IMPORT = re.compile(r'[}\w]\s*\bfrom ?"([^"\n]+)"|\bimport\("([^"\n]+)"\)')
NODE = shutil.which("node")

# Parses each module, and compares the thinning of series with the extremes of each bucket.
PARSE_ALL = """
const fs = require("fs"), vm = require("vm");
for (const path of process.argv.slice(1)) new vm.SourceTextModule(fs.readFileSync(path, "utf8"), {identifier: path});
"""
THIN = """
const { thinned } = await import(process.argv[1]);
const points = Array.from({ length: 6000 }, (_, step) => ({ step, value: Math.sin(step * step) * (step % 977) }));
const range = [1000, 5000];
const inside = points.filter(({ step }) => step >= range[0] && step <= range[1]);
console.log(JSON.stringify({ all: thinned(points, 100), zoomed: thinned(points, 100, range), inside, points }));
"""


@pytest.fixture(scope="module")
def client() -> TestClient:
    """A client of an app without its background tasks: these routes need neither server nor database."""
    return TestClient(create_app(Settings(key_pepper="pepper")))


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
    found = {
        path.name: urls
        for path in OUR_FILES
        if (urls := re.findall(r"https?://(?!www\.w3\.org/2000/svg)[^\s\"'`$]+", path.read_text()))
    }
    assert found == {}


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_every_module_parses() -> None:
    command = [NODE or "", "--experimental-vm-modules", "-e", PARSE_ALL, *map(str, MODULES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_a_thinned_series_keeps_the_extremes_of_each_bucket(tmp_path: Path) -> None:
    module = tmp_path / "thinning.mjs"
    module.write_text((FOLDER / "js" / "parts" / "thinning.js").read_text())
    command = [NODE or "", "--input-type=module", "-e", THIN, str(module)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    for kept, points in ((found["all"], found["points"]), (found["zoomed"], found["inside"])):
        assert len(kept) <= 2 * 100 + 4
        steps = [point["step"] for point in kept]
        assert steps == sorted(set(steps))
        values = {point["step"]: point["value"] for point in kept}
        first, last = points[0]["step"], points[-1]["step"]
        width = (last - first) / 100
        for bucket in range(99):
            inside = [
                point["value"]
                for point in points
                if first + width * bucket <= point["step"] < first + width * (bucket + 1)
            ]
            ours = [
                value
                for step, value in values.items()
                if first + width * bucket <= step < first + width * (bucket + 1)
            ]
            assert max(ours) == max(inside)
            assert min(ours) == min(inside)


def test_the_page_needs_no_key_and_has_a_strict_policy(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"] == POLICY
    assert "unsafe" not in POLICY
    assert answer.headers["cache-control"] == "no-cache"
    assert "{{" not in answer.text
    assert not re.search(r"<script(?![^>]*\bsrc=)|\bstyle=|<style", answer.text)


def test_a_browser_that_has_the_page_is_told_so(client: TestClient) -> None:
    etag = client.get("/").headers["etag"]
    again = client.get("/", headers={"if-none-match": etag})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/", headers={"if-none-match": '"other"'}).status_code == 200


def test_every_file_is_served_compressed_for_a_year(client: TestClient) -> None:
    version = load().version
    for name, asset in load().files.items():
        url = f"/dashboard/{version}/{name}"
        with client.stream("GET", url, headers={"accept-encoding": "gzip"}) as answer:
            raw = b"".join(answer.iter_raw())
        assert answer.headers["content-encoding"] == "gzip"
        assert "immutable" in answer.headers["cache-control"]
        assert answer.headers["content-type"] == asset.media_type
        assert gzip.decompress(raw) == (FOLDER / name).read_bytes()
    plain = client.get(f"/dashboard/{version}/js/main.js", headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.content == (FOLDER / "js" / "main.js").read_bytes()


def test_the_page_names_the_modules_that_it_needs_at_once(client: TestClient) -> None:
    page = client.get("/").text
    linked = re.findall(r'rel="modulepreload" href="([^"]+)"', page)
    assert f"/dashboard/{load().version}/js/main.js" in linked
    assert any(url.endswith("/vendor/preact.js") for url in linked)
    # Charts are needed by few pages, so the first one does not wait for them.
    assert not any(url.endswith("/vendor/uplot.js") for url in linked)
    for url in linked:
        assert client.get(url).status_code == 200, url


@pytest.mark.parametrize(
    "path", ["old-version/js/main.js", "{version}/js/none.js", "{version}/../assets.py"]
)
def test_an_unknown_file_is_refused_with_advice(client: TestClient, path: str) -> None:
    answer = client.get(f"/dashboard/{path.format(version=load().version)}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "unknown_url"
