"""What the overload bench makes of what went over the message queue."""

import time

import pytest

from app.contracts.control import Cancel, Unload
from app.contracts.generation import Delta, ReplyBatch
from app.contracts.messages import control_channel, reply_channel
from bench.callers import Drop, Wire, code_of
from bench.overload import told_of_drops

ANSWER = "cmpl-x"


def step(*answers: str) -> tuple[str, bytes]:
    """A publish of one engine step."""
    deltas = tuple(Delta(id=f"{answer}-0.1", choice=0, text="a") for answer in answers)
    return reply_channel("api"), ReplyBatch(replies=deltas).model_dump_json().encode()


CANCEL = control_channel("w"), Cancel(id=f"{ANSWER}-0.1").model_dump_json().encode()
UNLOAD = control_channel("w"), Unload(serving_key="models/x").model_dump_json().encode()


@pytest.mark.parametrize(
    ("heard", "has_stopped"),
    [
        ([step(ANSWER), CANCEL, step("cmpl-y")], True),
        ([step(ANSWER), UNLOAD, CANCEL, step(ANSWER, "cmpl-y"), step("cmpl-y")], True),
        ([step(ANSWER), CANCEL, step(ANSWER), step(ANSWER)], False),
        ([step(ANSWER), step("cmpl-y")], False),
    ],
    ids=["at once", "the step under way", "two steps", "never told"],
)
def test_a_drop_has_stopped_if_one_step_at_most_follows_the_cancel(
    heard: list[tuple[str, bytes]], has_stopped: bool
) -> None:
    wire, drop = Wire(), Drop(ANSWER, left_at=time.monotonic())
    for channel, data in heard:
        wire.note(channel, data)
    wire.judge(drop)
    assert drop.has_stopped is has_stopped
    assert told_of_drops([drop])["num_stopped_within_a_step"] == has_stopped


def test_a_refusals_code_is_read_from_its_body() -> None:
    assert code_of(b'{"error": {"code": "engine_overloaded"}}') == "engine_overloaded"
    assert code_of(b"") == "unreadable"
