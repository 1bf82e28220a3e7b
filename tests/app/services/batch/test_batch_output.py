"""The files of a batch are made by the holder of its lease alone."""

import json
from typing import Any

from app.db import batches, files
from app.db.schema.tables import Batch
from app.db.session import transaction
from app.json_limits import MAX_FIELDS
from app.services.batch.batch_output import end_batch, output_line
from app.settings import get_settings
from app.storage import store


def frozen_batch(num_requests: int = 2) -> Batch:
    """A batch of which one request is answered and one failed, that waits for its files; its input is lost."""
    columns: dict[str, Any] = {
        "endpoint": "/v1/completions",
        "input_file_id": "f",
        "input_key": "files/f",
    }
    with transaction() as session:
        batches.insert_batch(
            session, id="batch_1", project_id="p", num_requests=num_requests, errors=[], **columns
        )
        claimed = batches.claim(session, 60)
        assert claimed is not None
        assert claimed.lease_token is not None
        for line in (1, 2):
            output = output_line(f"q-{line}", response={"status_code": 200 * line})
            batches.record(
                session,
                "batch_1",
                claimed.lease_token,
                line=line,
                output=output,
                is_error=line == 2,
            )
        frozen = batches.begin_finalizing(session, "batch_1", claimed.lease_token)
        assert frozen is not None
        session.refresh(frozen)
        return frozen


def test_only_the_holder_of_the_lease_ends_a_batch_and_nobody_elses_files_stay(
    database: str,
) -> None:
    batch = frozen_batch()
    token = batch.lease_token or 0
    assert not end_batch(batch, token - 1, get_settings())
    assert store().children("files") == []
    assert end_batch(batch, token, get_settings())
    assert not end_batch(batch, token, get_settings())
    with transaction() as session:
        ended = batches.find_batch(session, "p", "batch_1")
        assert ended is not None
        assert (ended.status, ended.lease_token) == ("completed", None)
        made = [
            files.find_file(session, "p", name or "")
            for name in (ended.output_file_id, ended.error_file_id)
        ]
    assert store().children("files") == sorted(file.id for file in made if file is not None)
    for number, file in enumerate(made, 1):
        assert file is not None
        with store().open(file.store_key) as content:
            raw = content.read()
        assert (file.bytes, json.loads(raw)["custom_id"]) == (len(raw), f"q-{number}")


def test_a_batch_whose_input_is_lost_ends_with_what_it_has(database: str) -> None:
    batch = frozen_batch(num_requests=3)
    assert end_batch(batch, batch.lease_token or 0, get_settings())
    with transaction() as session:
        ended = batches.find_batch(session, "p", "batch_1")
        assert ended is not None
        assert ended.status == "expired"
        errors = files.find_file(session, "p", ended.error_file_id or "")
    assert errors is not None
    with store().open(errors.store_key) as content:
        assert [json.loads(raw)["custom_id"] for raw in content] == ["q-2"]


def test_a_batch_ends_with_an_unanswered_line_beyond_the_limits_of_today(database: str) -> None:
    batch = frozen_batch(num_requests=3)
    body = {"model": "m", "logit_bias": {str(n): 1 for n in range(MAX_FIELDS + 1)}}
    request = {"custom_id": "q-3", "method": "POST", "url": batch.endpoint, "body": body}
    with store().writer(batch.input_key) as file:
        file.write(b"{}\n{}\n" + json.dumps(request).encode())
    assert end_batch(batch, batch.lease_token or 0, get_settings())
    with transaction() as session:
        ended = batches.find_batch(session, "p", "batch_1")
        assert ended is not None
        errors = files.find_file(session, "p", ended.error_file_id or "")
    assert errors is not None
    with store().open(errors.store_key) as content:
        assert [json.loads(raw)["custom_id"] for raw in content] == ["q-2", "q-3"]
