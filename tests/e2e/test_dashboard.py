"""A browser walks through the dashboard of a real service, from the sign-in to a moved alias."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from playwright.sync_api import Browser, Page, Request, Route, expect

from tests.dashboard.browser import CHROMIUM, Observer, axe_findings, running_browser
from tests.e2e.service import TEACHER, Service
from tests.e2e.test_openai_client import method, rows, wait

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium"
    ),
]
PATIENCE_MS = 60_000
ALIAS = "walk@live"
JOBS = "/v1/fine_tuning/jobs"
SIGN_IN_CHECK = f"{JOBS}?limit=1"
PAGES = ("jobs", "new", "compare", "models", "playground", "traffic", "workers", "usage")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as running:
        yield running


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that has not signed in."""
    expect.set_options(timeout=PATIENCE_MS)
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    yield page
    context.close()


@pytest.fixture
def observer(page: Page, service: Service) -> Iterator[Observer]:
    """Observes the page. It must cause no unexpected error and no request to another host."""
    observer = Observer(page, service.url)
    yield observer
    assert observer.faults == []
    assert observer.expected_refusals == []


def sign_in(page: Page, service: Service, route: str = "jobs") -> None:
    page.goto(f"{service.url}/#/{route}")
    page.get_by_label("API key").fill(service.key)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_label("API key")).to_have_count(0)
    expect(page.locator("h1")).to_be_visible()


def open_page(page: Page, *parts: str) -> None:
    """Opens a page by its address, as a link in the dashboard does."""
    page.evaluate(
        "parts => { location.hash = '#/' + parts.map(encodeURIComponent).join('/') }", parts
    )


def demand_accessible(page: Page) -> None:
    assert axe_findings(page) == [], page.url


def choose_existing_file(page: Page, client: openai.OpenAI) -> None:
    """Chooses an earlier file in the form of a new job. Both purposes of training files count."""
    for number, purpose in enumerate(("fine-tune", "distillation")):
        file = client.files.create(
            file=(f"earlier-{number}.jsonl", rows(10, start=100 * (number + 1))),
            purpose=purpose,  # type: ignore[arg-type]  # OpenAI has no purpose `distillation`
        )
        page.reload()
        page.get_by_label("Or choose one").select_option(file.id)
        cell = f"What is a lantern? {100 * (number + 1)}"
        expect(page.get_by_role("cell", name=cell)).to_be_visible()


def upload_and_create(page: Page, folder: Path) -> str:
    """Uploads a training file, fills in the form for a job of some seconds, and returns its id."""
    path = folder / "lanterns.jsonl"
    path.write_bytes(rows(40))
    page.get_by_label("Upload a file").set_input_files(path)
    expect(page.get_by_text("First rows of the file")).to_be_visible()
    expect(page.get_by_role("cell", name="What is a lantern? 0")).to_be_visible()
    page.get_by_label("Teacher", exact=True).select_option(TEACHER)
    page.get_by_role("button", name="Show the tokens of these rows").click()
    expect(page.get_by_text(re.compile(r"^[0-9]+ tokens"))).to_have_count(5)
    page.get_by_label("Layers of the student").fill("2")
    page.get_by_label("Suffix").fill("walk")
    page.get_by_text("More options").click()
    hyperparameters = {**method()["distillation"]["hyperparameters"], "n_epochs": 4}
    evaluation = {"num_samples": 1, "metrics": ["agreement", "perplexity"]}
    more = {"hyperparameters": hyperparameters, "evaluation": evaluation}
    page.get_by_label("Further options of method.distillation as JSON").fill(json.dumps(more))
    expect(page.get_by_text(f'"teacher": "{TEACHER}"').first).to_be_attached()
    expect(page.get_by_text("Peak memory")).to_be_visible()
    demand_accessible(page)
    page.get_by_role("button", name="Create the job").click()
    expect(page).to_have_url(re.compile(r"#/job/ftjob-"))
    return page.url.rpartition("/")[2]


def watch_job(page: Page) -> None:
    """Watches the live page of a running job to its result, without loading it again."""
    loss = page.get_by_role("slider", name=re.compile("^Loss:"))
    expect(loss).to_be_visible()
    demand_accessible(page)
    expect(page.get_by_role("heading", name="Result")).to_be_visible()
    expect(page.locator(".subline .status")).to_have_text("Succeeded")
    expect(page.get_by_role("columnheader", name="Untrained student")).to_be_visible()
    expect(page.get_by_role("heading", name="Sample answers")).to_be_visible()
    loss.press("Home")
    first = loss.get_attribute("aria-valuetext") or ""
    assert re.match(r"Step \d+: (Training|Held-out) \d", first), first
    loss.press("ArrowRight")
    assert loss.get_attribute("aria-valuetext") != first
    table = page.locator("details.data").first
    table.locator("summary").click()
    expect(table.get_by_role("row").nth(2)).to_be_visible()
    demand_accessible(page)


def ask_both(page: Page, student: str) -> None:
    """Sends a prompt to teacher and student in the playground."""
    page.get_by_role("link", name="Try it beside its teacher").click()
    expect(page.get_by_role("combobox", name="First model")).to_have_value(TEACHER)
    expect(page.get_by_role("combobox", name="Second model")).to_have_value(student)
    page.get_by_label("Prompt", exact=True).fill("Who keeps the house?")
    page.get_by_role("button", name="Send to both models").click()
    for name in ("First model", "Second model"):
        side = page.get_by_role("region", name=name, exact=True)
        expect(side.locator(".answer-stats")).to_contain_text(re.compile(r"[0-9]+ tokens"))
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    demand_accessible(page)


def move_alias(page: Page, client: openai.OpenAI, student: str) -> None:
    """Points an alias at the teacher, moves it to the student, and rolls it back."""
    path = "/models/walk/aliases/live"

    def target() -> str:
        answer: dict[str, str] = client.get(path, cast_to=dict[str, str])
        return answer["model"]

    client.put(path, cast_to=object, body={"model": TEACHER})
    open_page(page, "model", student)
    expect(page.get_by_role("heading", name=student)).to_be_visible()
    page.get_by_label("Point an alias at this model").fill(ALIAS)
    page.get_by_role("button", name="Move the alias").click()
    row = page.get_by_role("listitem").filter(has_text=ALIAS).filter(has=page.get_by_role("button"))
    expect(row).to_be_visible()
    assert target() == student
    row.get_by_text("History").click()
    expect(row.get_by_role("row").nth(2)).to_contain_text("created")
    demand_accessible(page)
    row.get_by_role("button", name="Roll back").click()
    demand_accessible(page)
    page.get_by_role("dialog").get_by_role("button", name="Roll back").click()
    expect(page.get_by_text("No alias points at this model.")).to_be_visible()
    assert target() == TEACHER


def test_a_walk_from_the_sign_in_to_a_moved_alias(
    page: Page, observer: Observer, service: Service, client: openai.OpenAI, tmp_path: Path
) -> None:
    page.goto(service.url)
    demand_accessible(page)
    observer.expect_refusal(401, SIGN_IN_CHECK)
    page.get_by_label("API key").fill("sk-sh-0000000000000000-wrong-wrong-wrong-wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("the API key is wrong or revoked")
    sign_in(page, service)
    page.get_by_role("link", name="New job").last.click()
    choose_existing_file(page, client)
    job_id = upload_and_create(page, tmp_path)
    watch_job(page)
    student = wait(client, job_id).fine_tuned_model or ""
    ask_both(page, student)
    move_alias(page, client, student)
    # The worker has both models now, and the page names them.
    open_page(page, "workers")
    for name in (TEACHER, student):
        expect(page.get_by_role("link", name=name, exact=True)).to_be_visible()
    demand_accessible(page)
    open_page(page, "jobs")
    page.get_by_label(re.compile(f"Select {re.escape(student)}")).check()
    demand_accessible(page)


def cut_off(route: Route) -> None:
    """Answers a stream of events as if the connection were lost at once."""
    route.fulfill(status=200, content_type="text/event-stream", body=": ping\n")


def test_a_job_page_is_complete_although_its_streams_are_cut_off(
    page: Page, observer: Observer, service: Service, client: openai.OpenAI
) -> None:
    page.route(re.compile(r"/events\?.*stream=true"), cut_off)
    sign_in(page, service)
    file = client.files.create(file=("rows.jsonl", rows(40)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=TEACHER, training_file=file.id, method=method())
    open_page(page, "job", job.id)
    # Not `wait`: Playwright calls `cut_off` only while this thread waits in one of its methods.
    expect(page.locator(".subline .status")).to_have_text("Succeeded", timeout=120_000)
    newest = client.fine_tuning.jobs.list_events(job.id, limit=1).data[0]
    expect(page.get_by_label("Events, newest first").get_by_text(newest.message)).to_be_visible()
    streams = [request for request in observer.requests if "stream=true" in request]
    assert len(streams) > 1
    metrics = client.get(f"{JOBS.removeprefix('/v1')}/{job.id}/metrics", cast_to=dict[str, Any])
    (steps,) = [
        [point["step"] for point in series["points"]]
        for series in metrics["data"]
        if series["name"] == "train_loss"
    ]
    loss = page.get_by_role("slider", name=re.compile("^Loss:"))
    loss.press("End")
    assert (loss.get_attribute("aria-valuetext") or "").startswith(f"Step {steps[-1]}:")
    # A comparison shows this job, and says which one is missing.
    missing = f"{JOBS}/ftjob-none"
    observer.expect_refusal(404, missing, f"{missing}/metrics")
    page.goto(f"{service.url}/#/compare?jobs={job.id},ftjob-none")
    expect(page.get_by_role("alert")).to_contain_text("The job ftjob-none is not shown")
    expect(page.get_by_role("heading", name="Curves")).to_be_visible()
    page.get_by_role("button", name="Remove ftjob-none").click()
    expect(page).to_have_url(re.compile(f"jobs={job.id}$"))


def test_addresses_that_name_no_page_leave_the_dashboard_usable(
    page: Page, observer: Observer, service: Service
) -> None:
    sign_in(page, service, route="constructor")
    expect(page.get_by_role("heading", name="Jobs", exact=True)).to_be_visible()
    path = f"{JOBS}/%25"
    for visit in (lambda: page.goto(f"{service.url}/#/job/%"), page.reload):
        observer.expect_refusal(404, path, f"{path}/metrics", f"{path}/events?limit=100")
        visit()
        expect(page.get_by_role("alert")).to_be_visible()
    page.get_by_role("link", name="Models", exact=True).click()
    expect(page.get_by_role("link", name=TEACHER).first).to_be_visible()


def test_a_key_that_cannot_be_one_or_is_revoked_leads_to_the_sign_in(
    page: Page, observer: Observer, service: Service
) -> None:
    page.goto(service.url)
    page.get_by_label("API key").fill("sk-sh-schlüssel")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("characters that no API key has")
    key = service.new_key("dashboard", "models:read", "jobs:read")
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("link", name="Models", exact=True).click()
    expect(page.get_by_role("link", name=TEACHER).first).to_be_visible()
    service.cli("keys", "revoke", key)
    observer.expect_refusal(401, "/v1/models")
    page.get_by_role("button", name="Refresh").click()
    expect(page.get_by_text("You were signed out")).to_contain_text("wrong or revoked")
    expect(page.get_by_label("API key")).to_be_focused()


def test_answers_are_requested_once_and_aborted_when_the_page_is_left(
    page: Page, observer: Observer, service: Service
) -> None:
    answers = re.compile("/v1/(chat/)?completions$")
    aborted: list[Request] = []
    page.on("requestfailed", lambda request: aborted.append(request))
    page.route(answers, lambda _: None)  # the answer never comes
    sign_in(page, service, route=f"playground?a={TEACHER}&b={TEACHER}")
    send = page.get_by_role("button", name="Send to both models")
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill("Who keeps the house?")
    prompt.press("Control+Enter")
    expect(send).to_be_disabled()
    prompt.press("Control+Enter")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("Stopped", exact=True).first).to_be_visible()
    prompt.press("Control+Enter")
    expect(send).to_be_disabled()
    sent = [request for request in observer.requests if answers.search(request)]
    assert len(sent) == 4  # two per start
    open_page(page, "jobs")
    expect(page.get_by_role("heading", name="Jobs", exact=True)).to_be_visible()
    expect(page.locator(".loading")).to_have_count(0)
    assert len([request for request in aborted if answers.search(request.url)]) == 4


def test_a_model_without_a_chat_template_and_its_checkpoint_use_completions(
    page: Page, observer: Observer, service: Service, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(tiny_llama_dir, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    path.write_text(json.dumps(config))
    service.cli("models", "import", str(folder), "--name", "plain")
    page.route(re.compile("/completions$"), lambda _: None)  # the answer never comes
    sign_in(page, service, route="playground?a=plain&b=plain:ckpt-step-4")
    page.get_by_label("Prompt", exact=True).fill("Who keeps the house?")
    page.get_by_role("button", name="Send to both models").click()
    expect(page.get_by_text("Waiting for the first token …")).to_have_count(2)
    page.get_by_role("button", name="Stop").click()
    sent = [request for request in observer.requests if request.endswith("/completions")]
    assert sent == 2 * ["POST /v1/completions"]
    service.cli("models", "delete", "plain", "--yes")


def test_the_filter_of_stored_traffic_is_part_of_the_address(
    page: Page, observer: Observer, service: Service
) -> None:
    sign_in(page, service, route="traffic?model=some-model")
    expect(page.get_by_label("Model", exact=True)).to_have_value("some-model")
    metadata = page.get_by_label("Metadata")
    metadata.fill("task")
    page.get_by_role("button", name="Apply the filter").click()
    expect(page.get_by_role("alert")).to_contain_text("name=value")
    metadata.fill("task=faq")
    page.get_by_role("button", name="Apply the filter").click()
    expect(page).to_have_url(re.compile(r"model=some-model&metadata=task%3Dfaq$"))
    page.reload()
    expect(metadata).to_have_value("task=faq")
    expect(page.get_by_text("No stored completions")).to_be_visible()
    assert "model=some-model&metadata%5Btask%5D=faq" in next(
        request for request in reversed(observer.requests) if "/v1/chat/completions?" in request
    )
    page.get_by_role("link", name="Traffic").click()
    expect(metadata).to_have_value("")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_accessible_on_a_narrow_screen(
    browser: Browser, service: Service, scheme: str
) -> None:
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, color_scheme="dark" if scheme == "dark" else "light"
    )
    page = context.new_page()
    observer = Observer(page, service.url)
    sign_in(page, service)
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    page.get_by_role("link", name="Skip to the content").press("Enter")
    expect(page.get_by_role("main")).to_be_focused()
    for name in PAGES:
        open_page(page, name)
        expect(page.locator("h1")).to_be_visible()
        expect(page.locator(".loading")).to_have_count(0)
        demand_accessible(page)
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, f"{name} scrolls sideways"
    page.get_by_role("button", name="Menu").press("Enter")
    page.get_by_role("button", name="Theme: system").click()  # the next one is light
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("API key")).to_be_focused()
    assert page.evaluate("sessionStorage.length") == 0
    assert observer.faults == []
    context.close()


def send_marker(page: Page) -> None:
    """Sends a request of the test itself, which the observer sees after all earlier ones."""
    page.evaluate("fetch('/health/live').then(response => response.text())")


def wait_until_quiet(page: Page, observer: Observer) -> None:
    """Waits until the page itself has sent nothing between three requests of the test."""
    num_quiet = 0
    while num_quiet < 3:
        num_requests = len(observer.requests)
        send_marker(page)
        is_quiet = observer.requests[num_requests:] == ["GET /health/live"]
        num_quiet = num_quiet + 1 if is_quiet else 0


def test_pages_without_work_send_no_requests(
    browser: Browser, service: Service, client: openai.OpenAI
) -> None:
    file = client.files.create(file=("rows.jsonl", rows(20)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=TEACHER, training_file=file.id, method=method())
    client.fine_tuning.jobs.cancel(job.id)
    assert wait(client, job.id).status == "cancelled"
    context = browser.new_context()
    page = context.new_page()
    page.clock.install()
    observer = Observer(page, service.url)
    sign_in(page, service)
    pages = {"Configuration": ["job", job.id], "Jobs": ["jobs"], "Models": ["models"]}
    for heading, parts in {**pages, "Workers": ["workers"]}.items():
        open_page(page, *parts)
        expect(page.get_by_role("heading", name=heading, exact=True)).to_be_visible()
        expect(page.locator(".loading")).to_have_count(0)
        wait_until_quiet(page, observer)
        num_requests = len(observer.requests)
        page.clock.fast_forward(10 * 60 * 1000)
        send_marker(page)
        assert observer.requests[num_requests:] == ["GET /health/live"], parts
    assert observer.faults == []
    context.close()
