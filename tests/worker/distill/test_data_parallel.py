import pytest

from worker.distill.data_parallel import ALONE, Ranks

LENGTHS = [7, 3, 9, 9, 1, 4, 8, 2]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_are_the_whole_batch_and_weigh_alike(count: int) -> None:
    batch = [6, 0, 3, 2, 7, 5]
    shares = [Ranks(number, count).share(batch, LENGTHS) for number in range(count)]
    assert sorted(number for share in shares for number in share) == sorted(batch)
    assert all(share == [number for number in batch if number in share] for share in shares)
    loads = [sum(LENGTHS[number] for number in share) for share in shares]
    assert max(loads) - min(loads) <= max(LENGTHS)


def test_a_batch_of_fewer_rows_than_processes_leaves_some_without() -> None:
    assert [Ranks(number, 3).share([4, 0], LENGTHS) for number in range(3)] == [[0], [4], []]


def test_one_process_asks_nobody() -> None:
    assert ALONE.share([3, 1], LENGTHS) == [3, 1]
    assert ALONE.sum(1.5, 2.0) == [1.5, 2.0]
    assert not ALONE.any(False)
    assert ALONE.any(True)
    assert ALONE.from_first(lambda: {"a": 1}) == {"a": 1}
    assert ALONE.first_then_others(lambda: "done") == "done"
