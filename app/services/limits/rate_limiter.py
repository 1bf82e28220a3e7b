"""Rate limiter that is exact across API processes: one atomic script in Valkey.

The algorithm is the generic cell rate algorithm (GCRA), in its form as a leaky bucket. A request
adds its cost to the level of a bucket. The level falls continuously, by the limit per minute. A
request is refused if the level would exceed the limit.

Levels are whole numbers of 1/60,000,000 of a unit, so one microsecond lowers a level by exactly the
limit. Nothing is rounded: Lua's doubles are exact up to `MAX_PER_MINUTE`. Valkey keeps the level, the
time of its last change by its own clock, and the limit at that time.

After a limit was lowered, the level may be far above the new limit. It is then reduced to the new
limit, so that the change itself blocks requests for a minute at most.

Source: ITU-T Recommendation I.371, annex A: continuous-state leaky bucket.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import structlog
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from app.errors import Unavailable

log = structlog.get_logger(__name__)
T = TypeVar("T")

UNIT: Final = 60_000_000  # levels per request or token, and microseconds per minute
STOP_SECONDS: Final = 3.0  # longest wait at shutdown for Valkey
# RuntimeError: raised by uvloop for a write to a connection that has just been closed.
FAULTS: Final = (RedisError, OSError, RuntimeError)
# Lua prints large numbers with an exponent, unless the format is %.0f.
COMMON: Final = """
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])

local function read(key)
  local level, at, limit = string.match(redis.call('GET', key) or '', '^(%d+) (%d+) (%d+)$')
  return tonumber(level), tonumber(at), tonumber(limit)
end

-- The level now, of a level at an earlier time under another limit.
local function lowered(level, at, old_limit, limit)
  if old_limit > limit then level = math.min(level, limit * UNIT) end
  return math.max(level - math.max(now - at, 0) * limit, 0)
end

local function store(key, limit, level)
  if level > 0 then
    local value = string.format('%.0f %.0f %.0f', level, now, limit)
    redis.call('SET', key, value, 'PX', math.ceil(level / limit / 1000) + 1)
  else
    redis.call('DEL', key)
  end
end
""".replace("UNIT", str(UNIT))
# ARGV: limit and cost of each bucket. Returns the time, the index of the bucket that is blocked for
# longest (0: none, the costs are added), for how many microseconds, and the level of each bucket.
TAKE: Final = (
    COMMON
    + """
local blocked, longest, levels = 0, 0, {}
for i, key in ipairs(KEYS) do
  local limit, cost = tonumber(ARGV[2 * i - 1]), tonumber(ARGV[2 * i])
  local level, at, old_limit = read(key)
  levels[i] = level and lowered(level, at, old_limit, limit) or 0
  local excess = levels[i] + cost - limit * UNIT
  local wait = math.ceil(excess / limit)
  if wait > longest then blocked, longest = i, wait end
end
if blocked == 0 then
  for i, key in ipairs(KEYS) do
    levels[i] = levels[i] + tonumber(ARGV[2 * i])
    store(key, tonumber(ARGV[2 * i - 1]), levels[i])
  end
end
return {now, blocked, longest, unpack(levels)}
""".replace("UNIT", str(UNIT))
)
# ARGV: limit and change of each bucket, and time and level after the cost was taken. Of a cost,
# only what is still in the level is given back: other requests may have used the rest. The limit of
# the bucket may have changed since then, and the new one is kept. Returns the time.
SETTLE: Final = (
    COMMON
    + """
for i, key in ipairs(KEYS) do
  local limit, change = tonumber(ARGV[4 * i - 3]), tonumber(ARGV[4 * i - 2])
  local taken_at, taken_level = tonumber(ARGV[4 * i - 1]), tonumber(ARGV[4 * i])
  local level, at, new_limit = read(key)
  if not level then level, at, new_limit = 0, now, limit end
  local left = lowered(taken_level, taken_at, limit, new_limit)
  level = lowered(level, at, new_limit, new_limit)
  store(key, new_limit, math.max(level + math.max(change, -left), 0))
end
return now
"""
)


@dataclass(frozen=True)
class Bucket:
    """A limit per minute, and what a request takes of it. The limit is also the burst."""

    key: str
    limit: int
    cost: int


@dataclass(frozen=True)
class BucketState:
    """State of a bucket after a request: what it has left, and when it will be full again."""

    remaining: int
    reset_seconds: float
    level: int


@dataclass(frozen=True)
class Taken:
    """Result of a request to the rate limiter.

    blocked: Index of the bucket for which the request has to wait longest. No bucket has changed
        then. None: the costs have been taken from all buckets.
    taken_at: Time of Valkey, in microseconds.
    """

    buckets: Sequence[Bucket]
    states: Sequence[BucketState]
    taken_at: int
    blocked: int | None
    wait_seconds: float


class RateLimiter:
    """Takes costs from buckets in Valkey, and gives back what was not used.

    All methods run on the thread of the event loop.
    """

    def __init__(self, redis_url: str) -> None:
        # No retries: a script that was executed although its reply was lost would count twice.
        self._redis: Redis = Redis.from_url(
            redis_url,
            socket_timeout=1.0,
            socket_connect_timeout=1.0,
            retry=Retry(NoBackoff(), 0),
        )
        self._take = self._redis.register_script(TAKE)
        self._settle = self._redis.register_script(SETTLE)
        self._tasks: set[asyncio.Task[object]] = set()

    async def take(self, buckets: Sequence[Bucket]) -> Taken:
        """Takes the costs from all buckets, or from none. Raises Unavailable.

        If the caller is cancelled meanwhile, everything is given back.
        """
        job = self._spawn(self._run_take(buckets))
        try:
            # Shielded, because redis-py may swallow a cancellation.
            return await asyncio.shield(job)
        except asyncio.CancelledError:
            job.add_done_callback(self._undo)
            raise
        except FAULTS as fault:
            log.warning("rate_limits_unchecked", reason=type(fault).__name__)
            raise Unavailable(
                "the rate limits cannot be checked, because Valkey cannot be reached; try again soon",
                "rate_limiter_unavailable",
            ) from None

    def settle(self, taken: Taken, used: Sequence[int | None]) -> None:
        """Replaces the costs by what was used, in the background. None keeps a cost.

        If that fails, it is as if the costs had been used, which lasts for a minute at most.
        """
        changes = [
            (bucket, (count - bucket.cost) * UNIT, taken.taken_at, state.level)
            for bucket, state, count in zip(taken.buckets, taken.states, used, strict=True)
            if count is not None and count != bucket.cost
        ]
        if changes and taken.blocked is None:
            self._spawn(self._run_settle(changes))

    async def stop(self) -> None:
        """Waits for what is in progress, and closes the connections."""
        deadline = asyncio.get_running_loop().time() + STOP_SECONDS
        while self._tasks and (left := deadline - asyncio.get_running_loop().time()) > 0:
            await asyncio.wait(self._tasks, timeout=left)
            await asyncio.sleep(0)  # a task that ended may have begun another one
        for task in self._tasks:
            task.cancel()
        await self._redis.aclose()

    async def _run_take(self, buckets: Sequence[Bucket]) -> Taken:
        arguments = [number for each in buckets for number in (each.limit, each.cost * UNIT)]
        now, blocked, wait, *levels = await self._take([each.key for each in buckets], arguments)
        states = [
            BucketState(
                max(0, (bucket.limit * UNIT - level) // UNIT), level / bucket.limit / 1e6, level
            )
            for bucket, level in zip(buckets, levels, strict=True)
        ]
        return Taken(buckets, states, now, blocked - 1 if blocked else None, wait / 1e6)

    async def _run_settle(self, changes: Sequence[tuple[Bucket, int, int, int]]) -> None:
        arguments = [number for bucket, *numbers in changes for number in (bucket.limit, *numbers)]
        try:
            await self._settle([bucket.key for bucket, *_ in changes], arguments)
        except FAULTS as fault:
            log.warning("rate_limit_not_settled", reason=type(fault).__name__)

    def _undo(self, job: asyncio.Task[Taken]) -> None:
        if not job.cancelled() and job.exception() is None:
            taken = job.result()
            self.settle(taken, [0] * len(taken.buckets))

    def _spawn(self, work: Coroutine[object, object, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
