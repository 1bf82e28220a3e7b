"""The replies to one client request on their way to the coroutine that answers it."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from app.contracts.messages import MAX_ENTRIES_PER_BATCH, Delta, Done, GenerateRequest
from app.errors import StillhouseError, Unavailable

MAX_BACKLOG_ENTRIES = (
    16_384  # a flow keeps for a client that reads slowly, and 64 more for each choice
)


class ReplyStream:
    """The replies to one client request, each with the number of its prompt; close() ends what still runs."""

    def __init__(self, num_choices: int, on_end: Callable[[], None]) -> None:
        self.prompts_in_flight: set[InFlightPrompt] = set()
        self._max_backlog_entries = MAX_BACKLOG_ENTRIES + 64 * num_choices
        self._on_end = on_end
        self._backlog: deque[tuple[int, Delta | Done]] = deque()
        self._num_entries = 0  # of the backlog
        self._error: StillhouseError | None = None
        self._has_news = asyncio.Event()
        self._is_ended = False

    async def take(self) -> list[tuple[int, Delta | Done]]:
        """Returns replies that wait, at least one, and none when the flow has ended. Raises what it failed with.

        Many are given in parts of some milliseconds' work, with a turn for other coroutines between two parts.
        """
        if self._backlog:
            await asyncio.sleep(0)
        while not self._backlog and not self._is_ended:
            self._has_news.clear()
            await self._has_news.wait()
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
        if self._backlog and self._num_entries >= self._max_backlog_entries:
            self.fail(
                Unavailable("the client reads more slowly than the model writes", "slow_client")
            )
            return
        self._backlog.append((index, reply))
        self._num_entries += _num_entries(reply)
        self._has_news.set()

    def fail(self, error: StillhouseError) -> None:
        if not self._is_ended:
            self._error = error
            self._backlog.clear()
            self._num_entries = 0
            self.close()

    def close(self) -> None:
        """Ends the flow; prompts that still run are cancelled on their workers."""
        for prompt_in_flight in list(self.prompts_in_flight):
            prompt_in_flight.hang_up()
        if not self._is_ended:
            self._is_ended = True
            self._has_news.set()
            self._on_end()


def _num_entries(reply: Delta | Done) -> int:
    return reply.num_entries if isinstance(reply, Delta) else 1


@dataclass(eq=False)
class InFlightPrompt:
    """One prompt of a flow on one worker."""

    reply_stream: ReplyStream
    drop: "Callable[[InFlightPrompt], None]"
    index: int
    request: GenerateRequest
    wire_id: str = ""
    worker_id: str = ""
    num_sends: int = 0
    seen_at: float = 0.0  # sent, heard, or in its worker's heartbeat
    is_heard: bool = False

    def hang_up(self) -> None:
        """Forgets the leg and tells its worker to stop."""
        self.reply_stream.prompts_in_flight.discard(self)
        self.drop(self)
