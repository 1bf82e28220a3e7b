"""Reply stream of one client request, and the prompts in flight that feed it."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from app.contracts.generation import MAX_ENTRIES_PER_BATCH, Delta, Done, GenerateRequest
from app.errors import StillhouseError, Unavailable
from app.metrics.requests import Outcome, RequestMeter

# Entries (see `Delta.num_entries`) that a stream keeps for a slow client, and 64 more per choice.
MAX_BACKLOG_ENTRIES = 16_384


class TokenCount:
    """Tokens of a reply stream: those that workers have reported, and generated ones so far.

    partial: Number of generated tokens whose text has arrived, for each prompt that has a reply but
        is not complete. Its other tokens are not known.
    """

    def __init__(self) -> None:
        self.num_complete = 0
        self.num_input = 0
        self.num_cached = 0
        self.num_output = 0
        self.partial: dict[int, int] = {}

    def add(self, index: int, reply: Delta | Done) -> None:
        if isinstance(reply, Delta):
            self.partial[index] = self.partial.get(index, 0) + len(reply.tokens)
            return
        self.partial.pop(index, None)
        self.num_complete += 1
        self.num_input += reply.prompt_tokens
        self.num_cached += reply.cached_tokens
        self.num_output += reply.completion_tokens


class ReplyStream:
    """Replies to one client request in the order of arrival, each with the index of its prompt.

    It ends once: completed after the last reply, failed with an error, or aborted by `close`. Its
    meter counts the end, and `on_end` is called.
    """

    def __init__(
        self, num_choices: int, on_end: Callable[[TokenCount], None], meter: RequestMeter
    ) -> None:
        self.meter = meter
        self._num_tokens = TokenCount()
        self.prompts_in_flight: set[InFlightPrompt] = set()
        self._max_backlog_entries = MAX_BACKLOG_ENTRIES + 64 * num_choices
        self._on_end = on_end
        self._backlog: deque[tuple[int, Delta | Done]] = deque()
        self._num_entries = 0  # of the backlog
        self._error: StillhouseError | None = None
        self._has_replies = asyncio.Event()
        self._is_ended = False

    async def take(self) -> list[tuple[int, Delta | Done]]:
        """Waits for replies and returns them; returns an empty list when the stream has ended.

        A long backlog is returned in several calls, and other coroutines run between two calls.

        Raises:
            StillhouseError: The error that the stream failed with.
        """
        if self._backlog:
            await asyncio.sleep(0)
        while not self._backlog and not self._is_ended:
            self._has_replies.clear()
            await self._has_replies.wait()
        if self._error is not None:
            raise self._error
        taken: list[tuple[int, Delta | Done]] = []
        num_entries = 0
        while self._backlog and num_entries < MAX_ENTRIES_PER_BATCH:
            index, reply = self._backlog.popleft()
            taken.append((index, reply))
            num_entries += _num_entries(reply)
        self._num_entries -= num_entries
        return taken

    def put(self, index: int, reply: Delta | Done) -> None:
        self._num_tokens.add(index, reply)
        if self._backlog and self._num_entries >= self._max_backlog_entries:
            slow = Unavailable("the client reads more slowly than the model writes", "slow_client")
            self._end("aborted", slow)
            return
        self._backlog.append((index, reply))
        self._num_entries += _num_entries(reply)
        self._has_replies.set()

    def complete(self) -> None:
        """Ends the stream after the last reply. Replies that were not taken yet remain."""
        self._end("completed")

    def fail(self, error: StillhouseError) -> None:
        """Ends the stream with an error, which the next `take` raises."""
        self._end("failed", error)

    def close(self) -> None:
        """Ends the stream and cancels its unfinished prompts on their workers.

        Has no effect if the stream has ended.
        """
        self._end("aborted")

    def _end(self, outcome: Outcome, error: StillhouseError | None = None) -> None:
        if self._is_ended:
            return
        self._is_ended = True
        self.meter.end(outcome, error.code if error is not None else None)
        if error is not None:
            self._error = error
            self._backlog.clear()
            self._num_entries = 0
        for prompt_in_flight in list(self.prompts_in_flight):
            prompt_in_flight.hang_up()
        self._has_replies.set()
        self._on_end(self._num_tokens)


def _num_entries(reply: Delta | Done) -> int:
    return reply.num_entries if isinstance(reply, Delta) else 1


@dataclass(eq=False)
class InFlightPrompt:
    """One prompt of a reply stream, sent to one serve worker until its last reply.

    `wire_id` identifies the prompt in messages and is new for every send. `seen_at` is the
    monotonic time at which the prompt was last sent, answered, or listed in its worker's heartbeat.
    """

    reply_stream: ReplyStream
    drop: "Callable[[InFlightPrompt], None]"
    index: int
    request: GenerateRequest
    wire_id: str = ""
    worker_id: str = ""
    num_sends: int = 0
    seen_at: float = 0.0
    is_heard: bool = False  # a reply has arrived

    def hang_up(self) -> None:
        """Removes the prompt from its stream and tells its worker to stop."""
        self.reply_stream.prompts_in_flight.discard(self)
        self.drop(self)
