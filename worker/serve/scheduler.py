"""Who joins the batch next: first come, first served, within free rows and a prefill budget. No torch here."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """What the queue must know of a sequence; choices of one request share their prompt and its prefill."""

    @property
    def request_id(self) -> str: ...
    @property
    def prompt(self) -> Sequence[int]: ...


T = TypeVar("T", bound=Waiting)


class Scheduler(Generic[T]):
    """A queue that hands out prefills of at most `prefill_budget` tokens, padding included.

    `num_to_read` tells how many tokens of a prompt are not known from others.
    """

    def __init__(self, *, prefill_budget: int, num_to_read: Callable[[Sequence[int]], int] = len) -> None:
        self.prefill_budget = prefill_budget
        self._num_to_read = num_to_read
        self._waiting: deque[T] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, item: T) -> None:
        self._waiting.append(item)

    def admit(self, num_free_rows: int) -> list[list[T]]:
        """The next newcomers, grouped by shared prompt; a prompt over the budget goes alone."""
        groups: list[list[T]] = []
        longest = 0
        while self._waiting and num_free_rows:
            item = self._waiting[0]
            if groups and groups[-1][0].request_id == item.request_id:
                groups[-1].append(item)
            else:
                longest = max(longest, self._num_to_read(item.prompt))
                if groups and (len(groups) + 1) * longest > self.prefill_budget:
                    break
                groups.append([item])
            self._waiting.popleft()
            num_free_rows -= 1
        return groups

    def remove(self, is_unwanted: Callable[[T], bool]) -> list[T]:
        """Takes out and returns the waiting items for which the test holds."""
        removed = [item for item in self._waiting if is_unwanted(item)]
        if removed:
            self._waiting = deque(item for item in self._waiting if not is_unwanted(item))
        return removed
