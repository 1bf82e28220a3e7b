"""Room for generation is taken before the work and handed back once."""

import heapq

import pytest

from app.errors import BadRequest, TooManyRequests, Unavailable
from app.routing.admission import MAX_PAUSE_SECONDS, RETURNS_PER_SECOND, Admission, RefusedClients


def admission() -> Admission:
    return Admission(max_requests=4, max_tokens=1000, max_requests_per_key=3)


def test_a_key_over_its_share_waits_and_another_does_not() -> None:
    room = admission()
    room.reserve("a", num_requests=3, num_tokens=10)
    with pytest.raises(TooManyRequests):
        room.reserve("a", num_requests=1, num_tokens=10)
    room.reserve("b", num_requests=1, num_tokens=10)


@pytest.mark.parametrize(
    ("num_requests", "num_tokens"), [(3, 10), (1, 600)], ids=["requests", "tokens"]
)
def test_a_full_server_refuses_a_key_beyond_its_share(num_requests: int, num_tokens: int) -> None:
    room = admission()
    room.reserve("a", num_requests=3, num_tokens=500)
    with pytest.raises(TooManyRequests) as refusal:
        room.reserve("b", num_requests=num_requests, num_tokens=num_tokens)
    assert refusal.value.retry_after_seconds
    assert "is 2 and 500" in refusal.value.message


def test_a_key_alone_takes_everything_and_each_newcomer_still_gets_a_fair_share() -> None:
    room = Admission(max_requests=4, max_tokens=1000, max_requests_per_key=4)
    room.reserve("a", num_requests=3, num_tokens=1000)
    with pytest.raises(Unavailable):
        room.reserve("a", num_requests=1, num_tokens=1)
    room.reserve("b", num_requests=1, num_tokens=500)
    with pytest.raises(TooManyRequests):
        room.reserve("b", num_requests=1, num_tokens=1)
    room.reserve("c", num_requests=1, num_tokens=333)


def test_keys_above_their_share_wait_until_the_others_have_theirs() -> None:
    room = Admission(max_requests=8, max_tokens=1000, max_requests_per_key=8)
    returns = [room.reserve("a", num_requests=1, num_tokens=250) for _ in range(4)]
    room.reserve("b", num_requests=1, num_tokens=500)
    for give_back in returns[:2]:
        give_back()
    with pytest.raises(TooManyRequests):
        room.reserve("a", num_requests=1, num_tokens=250)
    returns[2]()
    room.reserve("a", num_requests=1, num_tokens=250)
    assert room.num_tokens == 1000


def test_what_never_fits_is_not_worth_a_retry() -> None:
    for num_requests, num_tokens in ((4, 10), (1, 1001)):
        with pytest.raises(BadRequest):
            admission().reserve("a", num_requests=num_requests, num_tokens=num_tokens)


def test_a_refusal_takes_nothing_and_room_comes_back_once() -> None:
    room = admission()
    give_back = room.reserve("a", num_requests=3, num_tokens=1000)
    with pytest.raises(TooManyRequests):
        room.reserve("b", num_requests=1, num_tokens=501)
    give_back()
    give_back()
    assert (room.num_requests, room.num_tokens) == (0, 0)
    room.reserve("a", num_requests=3, num_tokens=1000)


@pytest.mark.parametrize(
    ("num_callers", "pause"), [(10, 2), (1000, 10), (2500, 25), (90_000, MAX_PAUSE_SECONDS)]
)
def test_a_crowd_that_obeys_comes_back_spread_out(num_callers: int, pause: int) -> None:
    now = [0.0]
    num_waiting = RefusedClients(lambda: now[0])
    arrivals = [(0.0, caller) for caller in range(num_callers)]
    late: list[float] = []
    for _ in range(10 * num_callers):
        now[0], caller = heapq.heappop(arrivals)
        told = num_waiting.pause_seconds()
        assert 1 <= told <= 120
        heapq.heappush(arrivals, (now[0] + told, caller))
        late.append(told)
    assert abs(late[-1] - pause) <= 0.25 * pause
    assert len(late) / now[0] < 2.5 * RETURNS_PER_SECOND or pause == MAX_PAUSE_SECONDS


def test_a_crowd_that_went_home_is_forgotten() -> None:
    now = [0.0]
    num_waiting = RefusedClients(lambda: now[0])
    for second in range(30):
        now[0] = float(second)
        pauses = [num_waiting.pause_seconds() for _ in range(1000)]
    assert pauses[-1] > 15
    now[0] += 600
    assert num_waiting.pause_seconds() == 2
