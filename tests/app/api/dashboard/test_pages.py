"""Routes of the dashboard's files: the page, its policy, and files that browsers may keep."""

import gzip
import re

import pytest
from fastapi.testclient import TestClient

from app.api.dashboard.pages import POLICY
from app.dashboard.assets import FOLDER, load
from app.main import create_app
from app.settings import Settings


@pytest.fixture(scope="module")
def client() -> TestClient:
    """A client of an app without its background tasks: these routes need neither server nor database."""
    return TestClient(create_app(Settings(key_pepper="pepper")))


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
