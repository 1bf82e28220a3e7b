"""The replies to one client request on their way to the coroutine that answers it."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from app.contracts import Delta, Done, GenerateRequest
from app.errors import StillhouseError, Unavailable

MAX_BACKLOG = 2048  # replies a flow keeps for a client that reads slowly, and 32 more for each choice


class Flow:
    """The replies to one client request, each with the number of its prompt; close() ends what still runs."""

    def __init__(self, num_choices: int, on_end: Callable[[], None]) -> None:
        self.legs: set[Leg] = set()
        self._max_backlog = MAX_BACKLOG + 32 * num_choices
        self._on_end = on_end
        self._backlog: deque[tuple[int, Delta | Done]] = deque()
        self._error: StillhouseError | None = None
        self._has_news = asyncio.Event()
        self._is_ended = False

    async def take(self) -> list[tuple[int, Delta | Done]]:
        """All replies that wait, and at least one; none when the flow has ended. Raises what it failed with."""
        while not self._backlog and not self._is_ended:
            self._has_news.clear()
            await self._has_news.wait()
        if self._error is not None:
            raise self._error
        taken = list(self._backlog)
        self._backlog.clear()
        return taken

    def put(self, index: int, reply: Delta | Done) -> None:
        if len(self._backlog) >= self._max_backlog:
            self.fail(Unavailable("the client reads more slowly than the model writes", "slow_client"))
            return
        self._backlog.append((index, reply))
        self._has_news.set()

    def fail(self, error: StillhouseError) -> None:
        if not self._is_ended:
            self._error = error
            self._backlog.clear()
            self.close()

    def close(self) -> None:
        """Ends the flow; prompts that still run are cancelled on their workers."""
        for leg in list(self.legs):
            leg.hang_up()
        if not self._is_ended:
            self._is_ended = True
            self._has_news.set()
            self._on_end()


@dataclass(eq=False)
class Leg:
    """One prompt of a flow on one worker."""

    flow: Flow
    drop: "Callable[[Leg], None]"
    index: int
    request: GenerateRequest
    wire_id: str = ""
    worker_id: str = ""
    num_sends: int = 0
    seen_at: float = 0.0  # sent, heard, or in its worker's heartbeat
    is_heard: bool = False

    def hang_up(self) -> None:
        """Forgets the leg and tells its worker to stop."""
        self.flow.legs.discard(self)
        self.drop(self)
