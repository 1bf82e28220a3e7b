"""Admission control: limits the generation requests of an API process, fairly for all keys."""

import math
import time
from collections import Counter
from collections.abc import Callable

from app.errors import BadRequest, StillhouseError, TooManyRequests, Unavailable

# Target rate at which refused clients come back, per second. It is higher than the rate at which
# room becomes free, and low enough that refusing them again costs little.
RETURNS_PER_SECOND = 100.0
MIN_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 2, 120


class RefusedClients:
    """Computes the `Retry-After` of refused clients, so that they do not all come back at once.

    Each waiting client comes back once per pause. The number of refusals during one pause is
    therefore the number of waiting clients, and it determines the length of the next pause.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_at = clock()
        self._num_since = 0
        self._pause_seconds = MIN_PAUSE_SECONDS

    def pause_seconds(self) -> int:
        """Counts one more refused client and returns the seconds that it should wait."""
        seconds = self._clock() - self._began_at
        if seconds >= self._pause_seconds:
            has_left = seconds > 2 * self._pause_seconds
            num_waiting = 0 if has_left else self._num_since * self._pause_seconds / seconds
            pause = math.ceil(num_waiting / RETURNS_PER_SECOND)
            self._pause_seconds = min(max(pause, MIN_PAUSE_SECONDS), MAX_PAUSE_SECONDS)
            self._began_at, self._num_since = self._clock(), 0
        self._num_since += 1
        return self._pause_seconds


class Admission:
    """Reserves room for the generation requests of one API process before any work is done.

    Room is counted in prompts and in tokens, so that neither many small requests nor a few huge
    ones can fill the memory. A key that is alone may take all the room.

    With k active keys, a key is always admitted up to its fair share, 1/k of the room. This holds
    even if the other keys have left no free room. Beyond its share, a key gets only free room. At
    most room * (1 + 1/2 + ... + 1/k) is reserved in this way. While more than the room is reserved,
    keys above their share are refused.
    """

    def __init__(self, *, max_requests: int, max_tokens: int, max_requests_per_key: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._max_requests_per_key = max_requests_per_key
        self.num_requests = 0
        self.num_tokens = 0
        self._requests_of: Counter[str] = Counter()
        self._tokens_of: Counter[str] = Counter()
        self._refused = RefusedClients()

    def reserve(self, key_id: str, *, num_requests: int, num_tokens: int) -> Callable[[], None]:
        """Reserves room and returns the function that releases it.

        Raises:
            BadRequest: The request would never fit.
            TooManyRequests: The key has used its share.
            Unavailable: The server is full.
        """
        most_requests = min(self._max_requests_per_key, self._max_requests)
        if num_requests > most_requests or num_tokens > self._max_tokens:
            raise BadRequest(
                f"the request is too large: it has {num_requests} prompts and about {num_tokens} tokens, at most "
                f"{most_requests} and {self._max_tokens} are allowed; split it into smaller requests",
                "request_too_large",
                "prompt",
            )
        if self._requests_of[key_id] + num_requests > self._max_requests_per_key:
            raise TooManyRequests(
                f"this key has {self._requests_of[key_id]} generation requests running, at most "
                f"{self._max_requests_per_key} are allowed; wait until some have finished"
            )
        self.demand_room(key_id, num_requests, num_tokens)
        self._add(key_id, num_requests, num_tokens)
        is_reserved = True

        def give_back() -> None:
            """Releases the reservation. Further calls have no effect."""
            nonlocal is_reserved
            if is_reserved:
                is_reserved = False
                self._add(key_id, -num_requests, -num_tokens)

        return give_back

    def demand_room(self, key_id: str, num_requests: int = 1, num_tokens: int = 1) -> None:
        """Raises TooManyRequests or Unavailable if the key cannot reserve this much room now.

        Makes no database query, so that refusing many clients is cheap. It can be called before the
        key is verified.
        """
        is_full = (
            self.num_requests + num_requests > self._max_requests
            or self.num_tokens + num_tokens > self._max_tokens
        )
        if not is_full:
            return
        num_keys = len(self._requests_of) + (key_id not in self._requests_of)
        share_requests = max(1, self._max_requests // num_keys)
        share_tokens = self._max_tokens // num_keys
        key_requests, key_tokens = self._requests_of.get(key_id, 0), self._tokens_of.get(key_id, 0)
        if (
            key_requests + num_requests <= share_requests
            and key_tokens + num_tokens <= share_tokens
        ):
            return
        refusal: StillhouseError
        if num_keys == 1:
            refusal = Unavailable(
                "the server has reached its limit of generation requests; try again soon"
            )
        else:
            refusal = TooManyRequests(
                f"the server is full and the request exceeds this key's fair share: {key_requests} prompts and "
                f"{key_tokens} tokens are reserved, {num_requests} and {num_tokens} more were requested, and the limit "
                f"with {num_keys} active keys is {share_requests} and {share_tokens}; retry when earlier requests "
                "have finished"
            )
        refusal.retry_after_seconds = self._refused.pause_seconds()
        raise refusal

    def _add(self, key_id: str, num_requests: int, num_tokens: int) -> None:
        self.num_requests += num_requests
        self.num_tokens += num_tokens
        self._requests_of[key_id] += num_requests
        self._tokens_of[key_id] += num_tokens
        if not self._requests_of[key_id]:
            del self._requests_of[key_id], self._tokens_of[key_id]
