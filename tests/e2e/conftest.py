"""The service all end-to-end tests share."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.service import TEACHER, Service, start_service


@pytest.fixture(scope="package")
def service(service_dir: Path, tiny_llama_dir: Path) -> Iterator[Service]:
    """One service for all tests of the folder that do not break it, with the tiny teacher imported.

    It ends before the tests of other folders, because also an idle service takes CPU time.
    """
    running = start_service(service_dir / "e2e")
    try:
        running.cli("models", "import", str(tiny_llama_dir), "--name", TEACHER)
        yield running
    finally:
        assert running.stop() == 0


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with service.client() as made:
        yield made
