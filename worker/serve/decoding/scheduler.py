"""Scheduler of prefills: tenants take turns, within free rows and a budget of tokens."""

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from worker.serve.decoding.fair_queue import FairQueue


class Waiting(Protocol):
    """Properties of a sequence that the scheduler needs.

    The choices of one request share their prompt and its prefill.
    """

    @property
    def request_id(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def prompt(self) -> Sequence[int]: ...


T = TypeVar("T", bound=Waiting)


class Scheduler(Generic[T]):
    """Fair queue that returns prefills of at most `prefill_budget` tokens, padding included.

    A tenant is charged for the tokens of its prefills and for each token of an answer.
    `num_to_read` returns how many tokens of an item's prompt must be prefilled.
    """

    def __init__(self, *, prefill_budget: int, num_to_read: Callable[[T], int]) -> None:
        self.prefill_budget = prefill_budget
        self._num_to_read = num_to_read
        self._waiting: FairQueue[T] = FairQueue(lambda item: item.tenant)

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, item: T) -> None:
        self._waiting.add(item)

    def admit(self, num_free_rows: int) -> list[list[T]]:
        """Returns the sequences of the next prefill, grouped by request.

        A prompt that exceeds the budget is prefilled alone.
        """
        groups: dict[str, list[T]] = {}
        longest = 0
        while num_free_rows and (item := self._waiting.peek()) is not None:
            num_read = 0
            if item.request_id not in groups:
                num_read = self._num_to_read(item)
                longest = max(longest, num_read)
                if groups and (len(groups) + 1) * longest > self.prefill_budget:
                    break  # it stays first in the queue
            groups.setdefault(item.request_id, []).append(self._waiting.take(num_read))
            num_free_rows -= 1
        return list(groups.values())

    def charge_token(self, item: T) -> None:
        """Charges the tenant of an admitted sequence for one token of its answer."""
        self._waiting.charge(item, 1)

    def finish(self, item: T) -> None:
        """Ends a sequence that was admitted."""
        self._waiting.finish(item)

    def remove(self, is_unwanted: Callable[[T], bool]) -> list[T]:
        """Removes and returns the waiting sequences for which the predicate is true."""
        return self._waiting.remove(is_unwanted)
