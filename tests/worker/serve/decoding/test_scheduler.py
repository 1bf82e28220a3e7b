"""Admission: order, free rows, the prefill budget."""

from dataclasses import dataclass

from worker.serve.decoding.scheduler import Scheduler


@dataclass(frozen=True)
class Item:
    request_id: str
    prompt: tuple[int, ...]
    tenant: str = ""


def queue_of(*items: tuple[str, int], budget: int = 100) -> Scheduler[Item]:
    scheduler: Scheduler[Item] = Scheduler(
        prefill_budget=budget, num_to_read=lambda item: len(item.prompt)
    )
    for request_id, length in items:
        scheduler.add(Item(request_id, (1,) * length))
    return scheduler


def names(groups: list[list[Item]]) -> list[list[str]]:
    return [[item.request_id for item in group] for group in groups]


def test_first_come_first_served() -> None:
    scheduler = queue_of(("a", 5), ("b", 5), ("c", 5))
    assert names(scheduler.admit(2)) == [["a"], ["b"]]
    assert names(scheduler.admit(2)) == [["c"]]
    assert len(scheduler) == 0


def test_choices_of_one_request_share_a_prompt() -> None:
    assert names(queue_of(("a", 60), ("a", 60), ("a", 60)).admit(8)) == [["a", "a", "a"]]


def test_choices_that_find_no_row_wait() -> None:
    scheduler = queue_of(("a", 5), ("a", 5), ("a", 5))
    assert names(scheduler.admit(2)) == [["a", "a"]]
    assert names(scheduler.admit(2)) == [["a"]]


def test_padding_counts_towards_the_budget() -> None:
    scheduler = queue_of(("a", 10), ("b", 10), ("c", 40), ("d", 1), budget=100)
    # three rows as long as the third are 120 tokens
    assert names(scheduler.admit(8)) == [
        ["a"],
        ["b"],
    ]
    assert names(scheduler.admit(8)) == [["c"], ["d"]]


def test_a_prompt_over_the_budget_goes_alone() -> None:
    scheduler = queue_of(("a", 500), ("b", 1), budget=100)
    assert names(scheduler.admit(8)) == [["a"]]
    assert names(scheduler.admit(8)) == [["b"]]


def test_nobody_is_admitted_without_a_free_row() -> None:
    scheduler = queue_of(("a", 5))
    assert scheduler.admit(0) == []
    assert len(scheduler) == 1


def test_removed_items_do_not_come_up() -> None:
    scheduler = queue_of(("a", 5), ("b", 5))
    assert [item.request_id for item in scheduler.remove(lambda item: item.request_id == "a")] == [
        "a"
    ]
    assert names(scheduler.admit(8)) == [["b"]]


def test_tenants_take_turns_and_each_is_served_in_order() -> None:
    scheduler = queue_of(("a1", 5), ("a2", 5), ("a3", 5))
    scheduler.add(Item("b1", (1,) * 5, "b"))
    assert names(scheduler.admit(3)) == [["a1"], ["b1"], ["a2"]]


def test_choices_of_one_request_share_a_prefill_although_another_tenant_joins_between() -> None:
    scheduler = queue_of(("a", 5), ("a", 5), ("a", 5))
    scheduler.add(Item("b", (1,) * 5, "b"))
    assert names(scheduler.admit(8)) == [["a", "a", "a"], ["b"]]


def test_a_tenant_with_many_rows_waits_for_one_with_few() -> None:
    scheduler = queue_of(*[(f"a{number}", 5) for number in range(9)])
    scheduler.admit(4)
    for number in range(3):
        scheduler.add(Item(f"b{number}", (1,) * 5, "b"))
    assert names(scheduler.admit(3)) == [["b0"], ["b1"], ["b2"]]


def test_a_prompt_that_found_no_budget_is_the_next_one() -> None:
    scheduler = queue_of(("a1", 5), ("a2", 5))
    scheduler.add(Item("b", (1,) * 90, "b"))
    assert names(scheduler.admit(8)) == [["a1"]]
    assert names(scheduler.admit(8)) == [["b"]]
    assert names(scheduler.admit(8)) == [["a2"]]
