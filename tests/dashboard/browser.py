"""Debian's Chromium for tests of the dashboard, and an observer of requests and errors."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

AXE = Path(__file__).parent / "axe" / "axe.min.js"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SERIOUS = {"serious", "critical"}
REFUSAL = re.compile(r"Failed to load resource: the server responded with a status of ([0-9]{3})\b")


@contextmanager
def running_browser() -> Iterator[Browser]:
    """A headless Chromium that talks to no host but the ones that tests name."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class Observer:
    """Records the requests of a page, and its errors: of scripts, of the CSP, of the console.

    A browser also reports each refused request as an error. `expect_refusal` permits one of them.
    """

    def __init__(self, page: Page, origin: str) -> None:
        self.origin = origin
        self.expected_refusals: list[tuple[int, str]] = []
        self.requests: list[str] = []
        self.faults: list[str] = []
        page.on("request", self._request)
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.faults.append(f"script error: {error}"))

    def expect_refusal(self, status: int, *paths: str) -> None:
        """Permits one response with this status to each of the paths."""
        self.expected_refusals += [(status, path) for path in paths]

    def _request(self, request: Request) -> None:
        if not request.url.startswith((f"{self.origin}/", "data:", "blob:")):
            self.faults.append(f"a request to another host: {request.url}")
        self.requests.append(f"{request.method} {request.url.removeprefix(self.origin)}")

    def _console(self, message: ConsoleMessage) -> None:
        # A violation of the Content-Security-Policy is an error in the console, too.
        if message.type not in ("error", "warning"):
            return
        url = str(message.location.get("url", "")).removeprefix(self.origin)
        refusal = REFUSAL.match(message.text)
        if refusal and (int(refusal[1]), url) in self.expected_refusals:
            self.expected_refusals.remove((int(refusal[1]), url))
        else:
            self.faults.append(f"console {message.type}: {message.text} ({url})")


def axe_findings(page: Page) -> list[str]:
    """Serious and critical accessibility faults of the page, as it is now."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE.read_text())
    result: dict[str, Any] = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{fault['id']}: {fault['help']}: {[node['html'][:160] for node in fault['nodes']]}"
        for fault in result["violations"]
        if fault["impact"] in SERIOUS
    ]
