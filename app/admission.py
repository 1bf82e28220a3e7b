"""How much generation one API process takes on; the rest is told to come back."""

import math
import time
from collections import Counter
from collections.abc import Callable

from app.errors import BadRequest, TooManyRequests, Unavailable

RETURNS_A_SECOND = (
    100.0  # of those turned away: more than become free, and few enough to be turned away cheaply
)
MIN_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 2, 120


class Crowd:
    """How long those who are turned away should stay away, so that they do not all come back at once.

    Everyone comes once a pause, so those turned away within one pause are the crowd; it is spread over the next.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_at = clock()
        self._num_since = 0
        self._pause_seconds = MIN_PAUSE_SECONDS

    def pause_seconds(self) -> int:
        """For one more who is turned away."""
        seconds = self._clock() - self._began_at
        if seconds >= self._pause_seconds:
            has_gone_home = seconds > 2 * self._pause_seconds
            crowd = 0 if has_gone_home else self._num_since * self._pause_seconds / seconds
            pause = math.ceil(crowd / RETURNS_A_SECOND)
            self._pause_seconds = min(max(pause, MIN_PAUSE_SECONDS), MAX_PAUSE_SECONDS)
            self._began_at, self._num_since = self._clock(), 0
        self._num_since += 1
        return self._pause_seconds


class Admission:
    """Room for generation requests of one API process, taken before any of the work is done.

    Counts prompts and tokens, so that neither many small requests nor few huge ones can fill the memory.
    """

    def __init__(self, *, max_requests: int, max_tokens: int, max_requests_per_key: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._max_requests_per_key = max_requests_per_key
        self.num_requests = 0
        self.num_tokens = 0
        self._per_key: Counter[str] = Counter()
        self._crowd = Crowd()

    def reserve(self, key_id: str, *, num_requests: int, num_tokens: int) -> Callable[[], None]:
        """Takes the room, and gives what hands it back, once.

        Raises BadRequest for what would never fit, TooManyRequests when the key has used its share, and
        Unavailable when the server is full.
        """
        if (
            num_requests > min(self._max_requests_per_key, self._max_requests)
            or num_tokens > self._max_tokens
        ):
            raise BadRequest(
                f"too much for one request: {num_requests} prompts and about {num_tokens} tokens, at most "
                f"{min(self._max_requests_per_key, self._max_requests)} and {self._max_tokens}; send it in parts",
                "request_too_large",
                "prompt",
            )
        if self._per_key[key_id] + num_requests > self._max_requests_per_key:
            raise TooManyRequests(
                f"this key has {self._per_key[key_id]} generation requests running, at most "
                f"{self._max_requests_per_key} are allowed; wait for some to end"
            )
        self.demand_room(num_requests, num_tokens)
        self._add(key_id, num_requests, num_tokens)
        is_taken = True

        def give_back() -> None:
            nonlocal is_taken
            if is_taken:
                is_taken = False
                self._add(key_id, -num_requests, -num_tokens)

        return give_back

    def demand_room(self, num_requests: int = 1, num_tokens: int = 1) -> None:
        """Raises Unavailable if so much does not fit now. Costs nothing: a crowd is turned away before anything is looked up."""
        if (
            self.num_requests + num_requests > self._max_requests
            or self.num_tokens + num_tokens > self._max_tokens
        ):
            full = Unavailable("the server has as many generation requests as it can hold; try again soon")
            full.retry_after_seconds = self._crowd.pause_seconds()
            raise full

    def _add(self, key_id: str, num_requests: int, num_tokens: int) -> None:
        self.num_requests += num_requests
        self.num_tokens += num_tokens
        self._per_key[key_id] += num_requests
        if not self._per_key[key_id]:
            del self._per_key[key_id]
