"""Detects when the start of the service is complete: the API answers and workers are ready."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import httpx

from app.local.process_manager import Kept, Say
from app.local.server_process import LocalServiceError

API_SECONDS: Final = 60.0
WORKER_SECONDS: Final = 180.0  # a serve worker imports torch, which takes long on a busy machine
MAX_STARTS: Final = 2  # starts of a worker that ends before it is ready
NOTE_SECONDS: Final = 15.0  # between two messages about missing workers


class Startup:
    """Progress of the start of the service, with messages for the user.

    The start is complete when the API answers and each role that has workers has a ready one. Call
    `is_complete` periodically.
    """

    def __init__(
        self,
        url: str,
        api: Kept,
        workers: Mapping[str, Sequence[Kept]],
        say: Say,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url, self._api, self._say, self._clock = url, api, say, clock
        self._awaited = {role: kept for role, kept in workers.items() if kept}
        self._has_api = False
        self._began = self._noted_at = clock()

    def is_complete(self) -> bool:
        """Returns whether the service is ready. Raises LocalServiceError if the start failed."""
        num_serving = self._num_serving()
        if not self._has_api:
            return False
        for role, workers in list(self._awaited.items()):
            # A serve worker is ready when the API knows it: until then the API refuses requests.
            if num_serving if role == "serve" else any(worker.is_ready for worker in workers):
                del self._awaited[role]
                self._say(f"A {role} worker is ready")
            else:
                self._demand_hope(role, workers)
        if self._awaited and self._clock() - self._noted_at > NOTE_SECONDS:
            self._note_what_is_awaited()
        return not self._awaited

    def _num_serving(self) -> int:
        """Returns the number of serve workers that the API knows, or 0 if it does not answer.

        Raises LocalServiceError if the API has ended or has not answered in time.
        """
        waited = self._clock() - self._began
        if not self._has_api and (not self._api.is_running or waited > API_SECONDS):
            raise LocalServiceError(
                f"the API does not start; {self._api.log_path} ends with:\n{self._api.log_tail()}"
            )
        try:
            answer = httpx.get(f"{self._url}/health/ready", timeout=2, trust_env=False)
        except httpx.TransportError:
            return 0
        if answer.status_code != 200:
            return 0
        if not self._has_api:
            self._has_api = True
            self._say("The API answers")
        return int(answer.json()["serve_workers"])

    def _demand_hope(self, role: str, workers: Sequence[Kept]) -> None:
        """Raises LocalServiceError if the role's workers have failed or have taken too long."""
        have_died = all(
            worker.num_starts >= MAX_STARTS and not worker.is_running for worker in workers
        )
        waited = self._clock() - self._began
        if have_died or waited > WORKER_SECONDS:
            what = f"died {MAX_STARTS} times" if have_died else f"is not ready after {waited:.0f} s"
            raise LocalServiceError(
                f"the {role} worker {what} while it started; its log {workers[0].log_path} ends with:\n"
                f"{workers[0].log_tail()}\n"
                f"Fix the error shown in the log and run `stillhouse up` again, or start without this role: "
                f"`--{role}-workers 0`."
            )

    def _note_what_is_awaited(self) -> None:
        self._noted_at = self._clock()
        for role, workers in self._awaited.items():
            seconds = self._noted_at - self._began
            self._say(
                f"Waiting for a {role} worker for {seconds:.0f} s; its log is {workers[0].log_path}"
            )
