"""Takes screenshots of all pages of a running service, in light, dark and on a narrow screen.

    python -m tests.dashboard.screenshots http://127.0.0.1:8400 API_KEY FOLDER [JOB_ID]

It shows the job and its model: by default those of the newest job that has succeeded.
"""

import sys
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Browser, Page

from tests.dashboard.browser import Observer, running_browser

LOOKS = {
    "light": {"viewport": {"width": 1440, "height": 900}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1440, "height": 900}, "color_scheme": "dark"},
    "narrow": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light"},
}
PROMPT = "What is money? Answer in one short sentence."


def shots_of(url: str, key: str, job_id: str | None) -> dict[str, str]:
    """Returns the address of each page to show, by name."""
    headers = {"authorization": f"Bearer {key}"}
    jobs = httpx.get(f"{url}/v1/fine_tuning/jobs?limit=100", headers=headers).json()["data"]
    pages = dict.fromkeys(
        ("jobs", "new", "models", "playground", "traffic", "workers", "usage"), ""
    )
    shots = {name: name for name in pages}
    ended = [job for job in jobs if job["status"] == "succeeded"]
    ended.sort(key=lambda job: job["id"] != job_id)  # keeps the order of the others
    if ended:
        model = ended[0]["fine_tuned_model"].replace("/", "%2F")
        ids = ",".join(job["id"] for job in ended[:3])
        shots |= {"job": f"job/{ended[0]['id']}", "model": f"model/{model}"}
        shots |= {"compare": f"compare?jobs={ids}"}
        shots |= {"playground": f"playground?a={ended[0]['model']}&b={model}"}
    return shots


def take(browser: Browser, url: str, key: str, folder: Path, look: str, job_id: str | None) -> None:
    options: dict[str, Any] = LOOKS[look]
    context = browser.new_context(**options)
    page = context.new_page()
    observer = Observer(page, url)
    page.goto(url)
    page.screenshot(path=folder / f"{look}-sign-in.png")
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    for name, route in shots_of(url, key, job_id).items():
        page.goto(f"{url}/#/{route}")
        page.locator("h1").wait_for()
        page.wait_for_load_state("networkidle")
        if name == "playground":
            ask(page)
        page.wait_for_timeout(700)  # charts are drawn in the next frames
        page.screenshot(path=folder / f"{look}-{name}.png", full_page=True)
    print(look, "faults:", observer.faults or "none")
    context.close()


def ask(page: Page) -> None:
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_role("button", name="Send to both models").click()
    page.get_by_role("button", name="Stop").is_disabled()
    page.locator("button:has-text('Stop'):disabled").wait_for(timeout=60_000)


if __name__ == "__main__":
    out, job = Path(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else None
    out.mkdir(parents=True, exist_ok=True)
    with running_browser() as running:
        for look in LOOKS:
            take(running, sys.argv[1], sys.argv[2], out, look, job)
