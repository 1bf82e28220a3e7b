"""Callers that know no more of HTTP than they need: thousands of them, and ones that hang up in the middle."""

import asyncio
import json
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import redis.asyncio
from pydantic import TypeAdapter

from app.contracts.control import CONTROL, Cancel
from app.contracts.generation import Delta, ReplyBatch
from app.contracts.messages import control_channel, reply_channel
from bench.cases import Entry
from bench.load import Target

HEAD_END = b"\r\n\r\n"
HEAR_SECONDS = 1.0  # in which a generation that had gone on would have been heard of
JSON: TypeAdapter[Entry] = TypeAdapter(Entry)


@dataclass(frozen=True)
class Head:
    status: int
    headers: dict[str, str]


@asynccontextmanager
async def asking(target: Target, body: Entry) -> AsyncIterator[tuple[Head, asyncio.StreamReader]]:
    """The answer to a completion request on a connection of its own; leaving the block in the middle hangs up."""
    address = urlsplit(target.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        content = json.dumps({"model": target.model, **body}).encode()
        lines = [
            "POST /v1/completions HTTP/1.1",
            f"Host: {address.netloc}",
            f"Authorization: Bearer {target.key}",
        ]
        lines += [
            "Content-Type: application/json",
            f"Content-Length: {len(content)}",
            "Connection: close",
        ]
        writer.write("\r\n".join(lines).encode() + HEAD_END + content)
        first, *rest = (await reader.readuntil(HEAD_END)).decode().strip().split("\r\n")
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)
        }
        yield Head(int(first.split()[1]), headers), reader
    finally:
        writer.close()


@dataclass
class Tally:
    """What came of all requests."""

    num_answers: int = 0
    refusals: Counter[str] = field(default_factory=Counter)  # by status and code
    num_without_retry_after: int = 0
    num_hung: int = 0
    num_broken: int = 0  # connections that ended without an answer
    refusal_seconds: list[float] = field(default_factory=list)
    answer_seconds: list[float] = field(default_factory=list)


async def press(
    target: Target, tally: Tally, *, until: float, max_tokens: int, wait_seconds: float
) -> None:
    """One caller: asks again as soon as it may, until the time is up (by time.monotonic)."""
    body = {
        "prompt": "Write a story about a lantern.",
        "max_tokens": max_tokens,
        "ignore_eos": True,
    }
    while time.monotonic() < until:
        began = time.monotonic()
        try:
            async with asyncio.timeout(wait_seconds), asking(target, body) as (head, reader):
                content = await reader.read()
        except TimeoutError:
            tally.num_hung += 1
            continue
        except (OSError, asyncio.IncompleteReadError):
            tally.num_broken += 1
            await asyncio.sleep(1.0)
            continue
        seconds = time.monotonic() - began
        if head.status == 200:
            tally.num_answers += 1
            tally.answer_seconds.append(seconds)
            continue
        tally.refusals[f"{head.status} {code_of(content)}"] += 1
        tally.refusal_seconds.append(seconds)
        pause = head.headers.get("retry-after", "")
        if not (pause.isdigit() and 1 <= int(pause) <= 120):
            tally.num_without_retry_after += 1
            pause = "1"
        await asyncio.sleep(min(float(pause), max(0.0, until - time.monotonic())))


def code_of(content: bytes) -> str:
    start = content.find(b"{")
    try:
        return str(JSON.validate_json(content[start : content.rfind(b"}") + 1])["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return "unreadable"


@dataclass
class Drop:
    """One stream that its client left after the first token; times by time.monotonic."""

    answer_id: str
    left_at: float
    told_at: float | None = None  # when the worker was told
    num_after_leaving: int = 0  # deltas heard after the client had left, and of these
    num_after_telling: int = 0  # after the worker was told: one is the step that was under way

    @property
    def has_stopped(self) -> bool:
        """Within one step of the worker's being told."""
        return self.told_at is not None and self.num_after_telling <= 1


@dataclass
class Wire:
    """What goes over the message queue's channels, in order, by answer."""

    cancels: dict[str, int] = field(default_factory=dict)  # answer -> position
    deltas: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    times: list[float] = field(default_factory=list)  # of each position

    async def listen(self, redis_url: str, is_listening: asyncio.Event) -> None:
        async with redis.asyncio.Redis.from_url(redis_url) as client, client.pubsub() as pubsub:
            await pubsub.psubscribe(reply_channel("*"), control_channel("*"))
            async for message in pubsub.listen():
                is_listening.set()
                if message["type"] == "pmessage":
                    self.note(message["channel"].decode(), message["data"])

    def note(self, channel: str, data: bytes) -> None:
        position = len(self.times)
        self.times.append(time.monotonic())
        if channel.startswith(control_channel("")):
            message = CONTROL.validate_json(data)
            if isinstance(message, Cancel):
                self.cancels.setdefault(answer_of(message.id), position)
            return
        replies = ReplyBatch.model_validate_json(data).replies
        for answer_id in {answer_of(reply.id) for reply in replies if isinstance(reply, Delta)}:
            self.deltas[answer_id].append(position)

    def judge(self, drop: Drop) -> None:
        """Fills in what was heard of the drop."""
        heard = self.deltas[drop.answer_id]
        drop.num_after_leaving = sum(self.times[position] > drop.left_at for position in heard)
        told = self.cancels.get(drop.answer_id)
        if told is not None:
            drop.told_at = self.times[told]
            drop.num_after_telling = sum(position > told for position in heard)


def answer_of(wire_id: str) -> str:
    """The answer's id in `{answer}-{prompt}.{send}`."""
    return wire_id.rpartition("-")[0]


async def drop_streams(
    target: Target, redis_url: str, *, num_drops: int, num_callers: int
) -> list[Drop]:
    """So many streams, each left at its first token, with what the message queue carried of it afterwards."""
    wire, drops, is_listening = Wire(), [], asyncio.Event()
    ear = asyncio.create_task(wire.listen(redis_url, is_listening))
    await is_listening.wait()
    numbers = iter(range(num_drops))

    async def caller() -> None:
        for _ in numbers:
            drops.append(await leave_early(target))

    await asyncio.gather(*(caller() for _ in range(num_callers)))
    await asyncio.sleep(HEAR_SECONDS)
    ear.cancel()
    await asyncio.gather(ear, return_exceptions=True)
    for drop in drops:
        wire.judge(drop)
    return drops


async def leave_early(target: Target) -> Drop:
    """Raises RuntimeError for an answer that is no stream."""
    body = {
        "prompt": "Write a long story about a lantern.",
        "max_tokens": 200,
        "ignore_eos": True,
        "stream": True,
    }
    async with asking(target, body) as (head, reader):
        if head.status != 200:
            raise RuntimeError(f"{head.status}: {(await reader.read())[:300]!r}")
        while True:
            line = (await reader.readline()).decode()
            if not line:
                raise RuntimeError("the stream ended before its first token")
            if line.startswith("data: {"):
                chunk = JSON.validate_json(line.removeprefix("data: "))
                if any(choice["text"] for choice in chunk["choices"]):
                    return Drop(chunk["id"], time.monotonic())
