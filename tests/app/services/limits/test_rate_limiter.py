"""The scripts of the rate limiter in a real Valkey, against an obvious model; and what is given back when."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.errors import Unavailable
from app.services.limits.rate_limiter import (
    SETTLE,
    TAKE,
    UNIT,
    Bucket,
    BucketState,
    RateLimiter,
    Taken,
)

MINUTE = 60_000_000  # microseconds
LIMITS = st.one_of(st.integers(1, 50), st.sampled_from([6000, 70_001, 4_999_999]))


@dataclass
class Model:
    """Buckets as fractions of a request. Each is full of what was taken, and a limit drains in a minute."""

    limits: tuple[int, ...]
    used: list[Fraction] = field(default_factory=list)
    at: int = 0

    def drain(self, now: int) -> None:
        for i, limit in enumerate(self.limits):
            self.used[i] = max(
                self.used[i] - Fraction((now - self.at) * limit, MINUTE), Fraction(0)
            )
        self.at = now

    def waits(self, costs: tuple[int, ...], now: int) -> list[Fraction]:
        """For how many microseconds each bucket has no room for its cost."""
        self.drain(now)
        return [
            max(Fraction(0), (used + cost - limit) * MINUTE / limit)
            for used, cost, limit in zip(self.used, costs, self.limits, strict=True)
        ]


@dataclass
class Reservation:
    """What one request took, and how full each bucket was then."""

    costs: tuple[int, ...]
    at: int
    used: list[Fraction]


class Scene:
    """Valkey and the model side by side."""

    def __init__(self, client: "redis.Redis", limits: tuple[int, ...]) -> None:
        self.redis, self.limits = client, limits
        self.keys = [f"limit:{i}" for i in range(len(limits))]
        client.delete(*self.keys)
        self.model = Model(limits, [Fraction(0)] * len(limits))
        self.reservations: list[Reservation] = []
        self.scripts = client.register_script(TAKE), client.register_script(SETTLE)

    def pass_time(self, microseconds: int) -> None:
        """Moves all that is kept into the past, which is the same as waiting."""
        for key in self.keys:
            value = self.redis.get(key)
            if isinstance(value, bytes):
                level, at, limit = value.split()
                self.redis.set(key, b"%s %d %s" % (level, int(at) - microseconds, limit))
        self.model.at -= microseconds
        for reservation in self.reservations:
            reservation.at -= microseconds

    def take(self, costs: tuple[int, ...]) -> None:
        pairs = zip(self.limits, costs, strict=True)
        arguments = [number for limit, cost in pairs for number in (limit, cost * UNIT)]
        now, blocked, wait, *levels = self.scripts[0](self.keys, arguments)
        waits = self.model.waits(costs, now)
        assert wait == -(-max(waits) // 1)
        assert bool(blocked) == (max(waits) > 0)
        if blocked:
            assert -(-waits[blocked - 1] // 1) == wait
        else:
            for i, cost in enumerate(costs):
                self.model.used[i] += cost
            self.reservations.append(Reservation(costs, now, list(self.model.used)))
        assert [Fraction(level, UNIT) for level in levels] == self.model.used

    def settle(self, index: int, shares: tuple[Fraction, ...]) -> None:
        reservation = self.reservations.pop(index % len(self.reservations))
        changes = [int(c * share) - c for c, share in zip(reservation.costs, shares, strict=True)]
        arguments = []
        for i, limit in enumerate(self.limits):
            level = reservation.used[i] * UNIT
            assert level.denominator == 1
            arguments += [limit, changes[i] * UNIT, reservation.at, int(level)]
        now = self.scripts[1](self.keys, arguments)
        self.model.drain(now)
        for i, limit in enumerate(self.limits):
            passed = Fraction((now - reservation.at) * limit, MINUTE)
            left = max(reservation.used[i] - passed, Fraction(0))
            self.model.used[i] = max(
                self.model.used[i] + max(Fraction(changes[i]), -left), Fraction(0)
            )


@pytest.fixture(scope="module")
def client(valkey_url: str) -> Iterator["redis.Redis"]:
    with redis.Redis.from_url(valkey_url) as made:
        yield made


@given(data=st.data(), limits=st.tuples(LIMITS, LIMITS))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_scripts_do_what_the_model_does(
    client: "redis.Redis", data: st.DataObject, limits: tuple[int, int]
) -> None:
    scene = Scene(client, limits)
    costs = st.tuples(*(st.integers(1, limit) for limit in limits))
    shares = st.tuples(*(st.fractions(0, 2, max_denominator=10) for _ in limits))
    for _ in range(data.draw(st.integers(1, 12))):
        match data.draw(st.sampled_from(["take", "take", "settle", "wait"])):
            case "take":
                scene.take(data.draw(costs))
            case "settle" if scene.reservations:
                scene.settle(data.draw(st.integers(0, 20)), data.draw(shares))
            case _:
                scene.pass_time(data.draw(st.integers(0, 2 * MINUTE)))


def test_after_a_limit_was_lowered_no_request_waits_for_more_than_a_minute(
    client: "redis.Redis",
) -> None:
    scene = Scene(client, (1000,))
    scene.take((900,))
    _, blocked, wait, level = scene.scripts[0](scene.keys, [10, 4 * UNIT])
    assert blocked == 1
    assert level <= 10 * UNIT
    assert 0 < wait <= 0.4 * MINUTE  # the time in which the new limit frees four
    scene.pass_time(wait)
    assert scene.scripts[0](scene.keys, [10, 4 * UNIT])[1] == 0


@pytest.mark.parametrize("limit", [1000, 3000])
def test_a_request_that_ends_after_its_limit_has_changed_keeps_the_new_limit(
    client: "redis.Redis", limit: int
) -> None:
    scene = Scene(client, (2000,))
    at, _, _, level = scene.scripts[0](scene.keys, [2000, 500 * UNIT])
    assert scene.scripts[0](scene.keys, [limit, 500 * UNIT])[1] == 0
    scene.scripts[1](scene.keys, [2000, -500 * UNIT, at, level])
    value = client.get(scene.keys[0])
    assert isinstance(value, bytes)
    level, _, kept_limit = map(int, value.split())
    assert kept_limit == limit
    assert level == 500 * UNIT  # that of the second request


Work = Callable[[RateLimiter], Coroutine[object, object, None]]


@pytest.fixture
def run(valkey: str) -> Callable[[Work], None]:
    def do_run(work: Work) -> None:
        async def whole() -> None:
            limiter = RateLimiter(valkey)
            try:
                await work(limiter)
            finally:
                await limiter.stop()

        asyncio.run(whole())

    return do_run


def tokens(cost: int, limit: int = 1000) -> list[Bucket]:
    return [Bucket("limit:tokens", limit, cost)]


async def remaining(limiter: RateLimiter) -> int:
    """Tokens that are left beside one, without what has come back meanwhile."""
    taken = await limiter.take(tokens(1))
    return taken.states[0].remaining


def test_a_burst_of_the_limit_is_admitted_and_no_more(run: Callable[[Work], None]) -> None:
    async def work(limiter: RateLimiter) -> None:
        # a limit of one in 20 s, so that nothing comes back during the test
        taken = await asyncio.gather(
            *(limiter.take([Bucket("limit:requests", 3, 1)]) for _ in range(12))
        )
        assert sum(each.blocked is None for each in taken) == 3
        refused = [each for each in taken if each.blocked is not None]
        assert all(0 < each.wait_seconds <= 20 for each in refused)
        assert {each.states[0].remaining for each in refused} == {0}

    run(work)


def test_if_one_bucket_has_no_room_nothing_is_taken_from_the_others(
    run: Callable[[Work], None],
) -> None:
    async def work(limiter: RateLimiter) -> None:
        both = [Bucket("limit:a", 10, 4), Bucket("limit:b", 5, 4)]
        assert (await limiter.take(both)).blocked is None
        assert (await limiter.take(both)).blocked == 1
        assert (await limiter.take([Bucket("limit:a", 10, 6)])).blocked is None

    run(work)


def test_what_was_not_used_comes_back_and_what_was_used_beyond_is_taken(
    run: Callable[[Work], None],
) -> None:
    async def left_after(limiter: RateLimiter, used: int) -> int:
        taken = await limiter.take(tokens(900))
        limiter.settle(taken, [used])
        await finish(limiter)
        return await remaining(limiter)

    async def work(limiter: RateLimiter) -> None:
        assert await left_after(limiter, 30) in range(969, 1000)
        limiter.settle(await limiter.take(tokens(1)), [600])
        await finish(limiter)
        assert (await limiter.take(tokens(900))).blocked == 0

    run(work)


def test_what_is_settled_before_the_process_stops_is_not_lost(
    run: Callable[[Work], None],
) -> None:
    async def settle(limiter: RateLimiter) -> None:
        limiter.settle(await limiter.take(tokens(900)), [0])

    async def check(limiter: RateLimiter) -> None:
        assert await remaining(limiter) >= 999

    run(settle)
    run(check)


def test_the_reservation_of_a_process_that_is_killed_expires(
    run: Callable[[Work], None], client: "redis.Redis"
) -> None:
    async def work(limiter: RateLimiter) -> None:
        await limiter.take(tokens(900))  # and is never settled

    run(work)
    assert 0 < client.pttl("limit:tokens") <= 54_001


async def finish(limiter: RateLimiter) -> None:
    """Waits until all that was to be settled is settled."""
    await asyncio.gather(*limiter._tasks)


def test_a_request_that_is_cancelled_while_it_waits_for_valkey_takes_nothing(
    run: Callable[[Work], None], client: "redis.Redis"
) -> None:
    async def work(limiter: RateLimiter) -> None:
        await limiter.take(tokens(1))  # has a connection
        client.execute_command("CLIENT", "PAUSE", 5000, "WRITE")
        try:
            asking = asyncio.create_task(limiter.take(tokens(900)))
            await asyncio.sleep(0)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        finally:
            client.execute_command("CLIENT", "UNPAUSE")
        while limiter._tasks:
            await finish(limiter)
        assert await remaining(limiter) >= 998

    run(work)


def test_scripts_that_a_restart_of_valkey_forgot_are_sent_again(
    run: Callable[[Work], None], client: "redis.Redis"
) -> None:
    async def work(limiter: RateLimiter) -> None:
        await limiter.take(tokens(900))
        client.script_flush()
        assert (await limiter.take(tokens(900))).blocked == 0

    run(work)


def test_without_valkey_a_limited_request_is_refused_with_a_time_to_retry() -> None:
    async def work() -> None:
        limiter = RateLimiter("unix:///nonexistent/valkey.sock")
        with pytest.raises(Unavailable) as refused:
            await limiter.take(tokens(1))
        assert refused.value.code == "rate_limiter_unavailable"
        assert refused.value.retry_after_seconds
        limiter.settle(Taken(tokens(5), [BucketState(995, 0.3, 5 * UNIT)], 0, None, 0.0), [1])
        await limiter.stop()

    asyncio.run(work())
