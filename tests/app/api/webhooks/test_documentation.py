"""The code of docs/webhooks.md: it creates an endpoint, and the receiver that it shows accepts an event."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import openai.types.webhooks

from app.local.embedded_servers import free_port
from app.settings import Settings
from tests.app.api.conftest import Service
from tests.documentation import DOCS, code_blocks
from tests.waiting import wait_for


def test_the_receiver_of_the_documentation_accepts_events(
    settings_env: Callable[..., Settings], service: Service, tmp_path: Path
) -> None:
    settings_env(webhook_allowed_hosts="127.0.0.1")
    page = (DOCS / "webhooks.md").read_text()
    creation, receiver = (block.code for block in code_blocks(page, "python"))
    with service.client() as client:
        names: dict[str, object] = {"client": client}
        exec(creation, names)
        endpoint = names["endpoint"]
        assert isinstance(endpoint, openai.types.webhooks.WebhookEndpointWithSecret)
        port = free_port()
        log = (tmp_path / "log").open("wb+")
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", receiver.replace("8500", str(port))],
            env={**os.environ, "WEBHOOK_SECRET": endpoint.signing_secret},
            stdout=log,
        )
        try:
            client.webhooks.update(endpoint.id, url=f"http://127.0.0.1:{port}/")

            def is_accepted() -> bool:
                try:
                    tested = client.webhooks.test(endpoint.id, event_type="batch.completed")
                except openai.BadRequestError:  # the receiver has not started yet
                    return False
                assert tested.status_code == 204
                return True

            wait_for(is_accepted, 20, "the receiver did not start")
        finally:
            process.terminate()
            process.wait(20)
    log.seek(0)
    assert re.fullmatch(rb"evt_test_\w+ batch.completed batch_sample\n", log.read())
    log.close()
