"""A batch that no worker answers; in a module of its own, for the others share a worker."""

import time
from collections.abc import Callable

import openai
from sqlalchemy import text

from app.db.session import transaction
from tests.app.api.test_batches import line, read, submit, wait_for_end
from tests.waiting import wait_for


def test_requests_wait_for_a_worker_until_the_batch_expires(
    client: openai.OpenAI, register: Callable[..., str]
) -> None:
    register()
    batch = submit(client, [line(0), line(1), line(2)])
    wait_for(
        lambda: client.batches.retrieve(batch.id).status == "in_progress", 5, "nobody takes it"
    )
    time.sleep(0.5)  # every request has been refused with 503 by now
    with transaction() as session:
        session.execute(text("UPDATE batches SET expires_at = now()"))
    batch = wait_for_end(client, batch.id, 5)
    assert (batch.status, batch.output_file_id) == ("expired", None)
    assert batch.expired_at is not None
    rest = read(client, batch.error_file_id)
    assert [entry["custom_id"] for entry in rest] == ["q-0", "q-1", "q-2"]
    assert {entry["error"]["code"] for entry in rest} == {"batch_expired"}
