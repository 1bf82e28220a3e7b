"""The rows that the bench of pairs teaches and asks."""

from collections import Counter

from bench.pair_models import NUM_HELD_OUT, THINGS, make_rows


def test_what_is_held_out_is_taught_in_three_other_ways() -> None:
    train, held_out = make_rows()
    values = Counter(fact(row["completion"]) for row in train)
    assert len(held_out) == NUM_HELD_OUT
    assert not {row["prompt"] for row in held_out} & {row["prompt"] for row in train}
    assert [row for row in held_out if values[fact(row["completion"])] != 3] == []


def fact(answer: str) -> tuple[str, str]:
    """The thing, and its colour, place, owner or material, which every answer ends with."""
    words = answer.rstrip(".").split()
    (thing,) = set(words) & set(THINGS)
    return thing, words[-1]
