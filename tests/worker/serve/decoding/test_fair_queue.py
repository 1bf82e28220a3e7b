"""The fair queue: turns, costs, and what idle time is worth."""

import operator
import random
from collections import defaultdict
from functools import partial
from typing import NamedTuple

import pytest

from worker.serve.decoding.fair_queue import RUNNING_COST, FairQueue


class Item(NamedTuple):
    tenant: str
    number: int
    cost: int = 1


def queue_of(*items: Item, max_running: int | None = None) -> FairQueue[Item]:
    queue: FairQueue[Item] = FairQueue(lambda item: item.tenant, max_running=max_running)
    for item in items:
        queue.add(item)
    return queue


def take_all(queue: FairQueue[Item]) -> str:
    """Takes and finishes one item after the other; returns their tenants."""
    tenants = ""
    while (item := queue.peek()) is not None:
        queue.finish(queue.take(item.cost))
        tenants += item.tenant
    return tenants


def many(tenant: str, count: int, cost: int = 1) -> list[Item]:
    return [Item(tenant, number, cost) for number in range(count)]


def test_tenants_take_turns_however_much_each_has_waiting() -> None:
    assert take_all(queue_of(*many("a", 6), *many("b", 3), *many("c", 1))) == "abcababaaa"


def test_turns_are_by_cost() -> None:
    assert take_all(queue_of(*many("a", 4, cost=30), *many("b", 8, cost=10))) == "abbbabbbabba"


def test_a_tenant_does_not_take_every_place_before_its_costs_are_known() -> None:
    queue = queue_of(*many("a", 10, cost=1), *many("b", 10, cost=RUNNING_COST // 8))
    taken = [queue.take(item.cost) for _ in range(8) if (item := queue.peek()) is not None]
    assert sum(item.tenant == "a" for item in taken) == 4


def test_idle_time_earns_no_credit() -> None:
    queue = queue_of(*many("a", 100, cost=10))
    for _ in range(50):
        queue.finish(queue.take(10))
    for item in many("b", 4, cost=10):
        queue.add(item)
    assert take_all(queue).startswith("ababababaa")


def test_a_tenant_at_its_limit_is_passed_over() -> None:
    queue = queue_of(*many("a", 3), *many("b", 1), max_running=1)
    first = queue.take()
    second = queue.take()
    assert (first.tenant, second.tenant) == ("a", "b")
    assert queue.peek() is None
    queue.finish(first)
    assert queue.peek() == Item("a", 1)


def test_removed_items_do_not_come_up() -> None:
    queue = queue_of(*many("a", 3), *many("b", 2))
    assert queue.remove(lambda item: item.number == 1) == [Item("a", 1), Item("b", 1)]
    assert len(queue) == 3
    assert take_all(queue) == "aba"


class Reference:
    """The same rules, written down as plainly as possible: everything is looked up anew in lists."""

    def __init__(self) -> None:
        self.waiting: list[Item] = []
        self.running: list[Item] = []
        self.costs: defaultdict[str, int] = defaultdict(int)
        self.turns: defaultdict[str, int] = defaultdict(int)
        self.last: str | None = None
        self.level = 0
        self.num_turns = 0

    def next_turn(self) -> int:
        self.num_turns += 1
        return self.num_turns

    def add(self, item: Item) -> None:
        tenants = {other.tenant for other in self.waiting}
        if not tenants and not self.running:
            self.costs.clear()
            self.last = None
            self.level = 0
        costs = [self.costs[tenant] for tenant in tenants]
        costs += [self.costs[self.last]] if self.last and not tenants else []
        self.level = max(self.level, min(costs, default=0))
        if item.tenant not in tenants:
            is_running = any(other.tenant == item.tenant for other in self.running)
            if self.costs[item.tenant] <= self.level and not is_running:
                self.turns[item.tenant] = self.next_turn()  # like a new tenant
            self.costs[item.tenant] = max(self.costs[item.tenant], self.level)
        self.waiting.append(item)

    def rank(self, item: Item) -> tuple[int, int]:
        num_running = sum(other.tenant == item.tenant for other in self.running)
        return self.costs[item.tenant] + RUNNING_COST * num_running, self.turns[item.tenant]

    def take(self) -> Item:
        item = min(self.waiting, key=self.rank)
        self.waiting.remove(item)
        self.running.append(item)
        self.costs[item.tenant] += item.cost
        self.turns[item.tenant] = self.next_turn()
        self.last = item.tenant
        return item


@pytest.mark.parametrize("seed", range(20))
def test_every_schedule_is_that_of_the_plain_rules(seed: int) -> None:
    rng = random.Random(seed)
    queue, reference = queue_of(), Reference()
    for number in range(400):
        move = rng.choice(["add", "add", "take", "charge", "finish", "remove"])
        if move == "add":
            item = Item(rng.choice("abcd"), number, rng.choice((1, 10, 300)))
            queue.add(item)
            reference.add(item)
        elif move == "take" and reference.waiting:
            assert queue.peek() == reference.take()
            queue.take(reference.running[-1].cost)
        elif move == "charge" and reference.running:
            item = rng.choice(reference.running)
            queue.charge(item, 7)
            reference.costs[item.tenant] += 7
        elif move == "finish" and reference.running:
            item = reference.running.pop(rng.randrange(len(reference.running)))
            queue.finish(item)
        elif move == "remove" and reference.waiting and rng.random() < 0.3:
            unwanted = rng.choice(reference.waiting)
            assert queue.remove(partial(operator.is_, unwanted)) == [unwanted]
            reference.waiting.remove(unwanted)
        assert len(queue) == len(reference.waiting)
