"""Room for generation is taken before the work and handed back once."""

import pytest

from app.admission import Admission
from app.errors import BadRequest, TooManyRequests, Unavailable


def admission() -> Admission:
    return Admission(max_requests=4, max_tokens=1000, max_requests_per_key=3)


def test_a_key_over_its_share_waits_and_another_does_not() -> None:
    room = admission()
    room.reserve("a", num_requests=3, num_tokens=10)
    with pytest.raises(TooManyRequests):
        room.reserve("a", num_requests=1, num_tokens=10)
    room.reserve("b", num_requests=1, num_tokens=10)


@pytest.mark.parametrize(("num_requests", "num_tokens"), [(2, 10), (1, 600)], ids=["requests", "tokens"])
def test_a_full_server_refuses(num_requests: int, num_tokens: int) -> None:
    room = admission()
    room.reserve("a", num_requests=3, num_tokens=500)
    with pytest.raises(Unavailable):
        room.reserve("b", num_requests=num_requests, num_tokens=num_tokens)


def test_what_never_fits_is_not_worth_a_retry() -> None:
    for num_requests, num_tokens in ((4, 10), (1, 1001)):
        with pytest.raises(BadRequest):
            admission().reserve("a", num_requests=num_requests, num_tokens=num_tokens)


def test_a_refusal_takes_nothing_and_room_comes_back_once() -> None:
    room = admission()
    give_back = room.reserve("a", num_requests=3, num_tokens=1000)
    with pytest.raises(Unavailable):
        room.reserve("b", num_requests=1, num_tokens=1)
    give_back()
    give_back()
    assert (room.num_requests, room.num_tokens) == (0, 0)
    room.reserve("a", num_requests=3, num_tokens=1000)
