"""Stored completions as the spool writes them, for tests that need no serve worker."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from app.db.session import transaction
from app.db.traffic.completions import insert_records

BEGUN_AT = float(int(time.time()) - 86_400)  # yesterday, so that the retention keeps them


def record(number: int, **changes: Any) -> dict[str, Any]:  # Any: columns, by name
    """The columns of one completion whose question and answer hold its number."""
    question = changes.pop("question", f"What does the lantern number {number} mean?")
    answer = changes.pop("answer", f"It means that the number is {number}.")
    messages = changes.pop("messages", [{"role": "user", "content": question}])
    model = changes.get("model", "tiny")
    completion = {
        "id": f"chatcmpl-{number:04}",
        "object": "chat.completion",
        "created": int(BEGUN_AT) + number,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": answer, "refusal": None},
                "logprobs": None,
                "finish_reason": changes.pop("finish_reason", "stop"),
            }
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12},
    }
    columns = {
        "id": completion["id"],
        "project_id": "acme",
        "key_id": "key",
        "model": model,
        "metadata": {},
        "request_id": f"req_{number}",
        "request": json.dumps({"model": model, "temperature": 0.5}),
        "messages": json.dumps(messages),
        "completion": json.dumps(completion),
        "latency_seconds": 0.25,
        "prompt_tokens": 5,
        "completion_tokens": 7,
        "created_at": BEGUN_AT + number,
    } | changes
    texts = (columns["request"], columns["messages"], columns["completion"])
    return {"bytes": sum(map(len, texts)), **columns}


def insert(records: Sequence[Mapping[str, Any]]) -> None:
    lines = [json.dumps(columns).encode() for columns in records]
    with transaction() as session:
        insert_records(session, uuid4().hex, 0, lines)
