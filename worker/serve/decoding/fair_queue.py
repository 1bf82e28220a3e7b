"""Fair queue for the items of several tenants. Does not import torch."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

RUNNING_COST = 256  # extra cost of each item in progress, until it ends


@dataclass(eq=False)
class _Tenant(Generic[T]):
    waiting: deque[T] = field(default_factory=deque)
    cost: int = 0  # charged so far, comparable between tenants
    num_running: int = 0
    last_turn: int = 0  # number of its last turn, or of its first arrival

    @property
    def is_active(self) -> bool:
        return bool(self.waiting or self.num_running)

    @property
    def rank(self) -> tuple[int, int]:
        return self.cost + RUNNING_COST * self.num_running, self.last_turn


class FairQueue(Generic[T]):
    """Queue of items of several tenants, which serves the tenant with the lowest cost next.

    The items of one tenant are served first come, first served. A tenant is charged when costs
    become known. Each of its items in progress adds RUNNING_COST to its cost, so that it cannot
    take all places before its costs are known. A tenant that had nothing waiting starts at the
    level of the others: idle time earns no credit.

    `max_running` limits the items of one tenant that are in progress at the same time.

    Source: the virtual token counter of Sheng et al., arXiv:2401.00588.
    """

    def __init__(self, tenant_of: Callable[[T], str], *, max_running: int | None = None) -> None:
        self._tenant_of = tenant_of
        self._max_running = max_running
        self._tenants: dict[str, _Tenant[T]] = {}
        self._last: _Tenant[T] | None = None  # tenant of the item taken last
        self._level = 0  # least cost of a tenant that begins to wait
        self._num_turns = 0
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def add(self, item: T) -> None:
        self._raise_level()
        name = self._tenant_of(item)
        if name not in self._tenants:
            self._num_turns += 1
            self._tenants[name] = _Tenant(last_turn=self._num_turns)
        tenant = self._tenants[name]
        if not tenant.waiting:
            tenant.cost = max(tenant.cost, self._level)
        tenant.waiting.append(item)
        self._num_waiting += 1

    def peek(self) -> T | None:
        """Returns the next item without removing it, or None if no item may start."""
        tenant = self._next()
        return None if tenant is None else tenant.waiting[0]

    def take(self, cost: int = 0) -> T:
        """Removes and returns the item that `peek` returns, and charges its tenant.

        The item is in progress until `finish`.
        """
        tenant = self._next()
        assert tenant is not None, "the caller peeks first"
        self._num_turns += 1
        tenant.last_turn = self._num_turns
        tenant.cost += cost
        tenant.num_running += 1
        self._last = tenant
        self._num_waiting -= 1
        return tenant.waiting.popleft()

    def charge(self, item: T, cost: int) -> None:
        """Charges the tenant of an item in progress."""
        self._tenants[self._tenant_of(item)].cost += cost

    def finish(self, item: T) -> None:
        """Ends an item that was taken."""
        self._tenants[self._tenant_of(item)].num_running -= 1

    def remove(self, is_unwanted: Callable[[T], bool]) -> list[T]:
        """Removes and returns the waiting items for which the predicate is true."""
        removed: list[T] = []
        for tenant in self._tenants.values():
            unwanted = [item for item in tenant.waiting if is_unwanted(item)]
            if unwanted:
                tenant.waiting = deque(item for item in tenant.waiting if not is_unwanted(item))
                removed += unwanted
        self._num_waiting -= len(removed)
        return removed

    def _next(self) -> _Tenant[T] | None:
        ready = [
            tenant
            for tenant in self._tenants.values()
            if tenant.waiting
            and (self._max_running is None or tenant.num_running < self._max_running)
        ]
        return min(ready, key=lambda tenant: tenant.rank, default=None)

    def _raise_level(self) -> None:
        """Updates the level, and forgets the tenants that would begin there anyway."""
        if not any(tenant.is_active for tenant in self._tenants.values()):
            self._tenants, self._last, self._level = {}, None, 0
        waiting = [tenant.cost for tenant in self._tenants.values() if tenant.waiting]
        least = min(waiting, default=self._last.cost if self._last is not None else 0)
        self._level = max(self._level, least)
        self._tenants = {
            name: tenant
            for name, tenant in self._tenants.items()
            if tenant.is_active or tenant.cost > self._level
        }
