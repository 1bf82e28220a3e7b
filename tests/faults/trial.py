"""One promise under fault: what is injected, until when, and what comes out of it."""

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from tests.faults.checker import Verdict, check, settle, unaccounted_requests
from tests.faults.client import TERMINAL, Accepted, Client, Ledger
from tests.faults.system import START_SECONDS, TEACHER, System, wait_until

PROBE_SECONDS: Final = 90.0
Json = dict[str, Any]  # Any: what goes into the report


@dataclass
class Figures:
    """What the table says of one promise. `wrongs` are sentences; a kept promise has none."""

    promise: str
    faults: int = 0
    target: int = 0
    accepted: int = 0
    trained: int = 0
    lost: int = 0
    duplicated: int = 0
    recovered_seconds: list[float] = field(default_factory=list)
    wrongs: list[str] = field(default_factory=list)
    seconds: float = 0.0
    notes: Json = field(default_factory=dict)

    @property
    def is_kept(self) -> bool:
        return not (self.lost or self.duplicated or self.wrongs)

    def as_json(self) -> Json:
        return {
            "promise": self.promise,
            "faults": self.faults,
            "target": self.target,
            "accepted": self.accepted,
            "trained": self.trained,
            "lost": self.lost,
            "duplicated": self.duplicated,
            "recovered_p50_s": percentile(self.recovered_seconds, 50),
            "recovered_p95_s": percentile(self.recovered_seconds, 95),
            "is_kept": self.is_kept,
            "wrongs": self.wrongs[:20],
            "seconds": round(self.seconds, 1),
            "notes": self.notes,
        }


@dataclass
class Trial:
    """Hands a promise its system, its dice and its limits: `target` faults, or the time."""

    promise: str
    system: System
    rng: random.Random
    target: int
    seconds: float
    faults: Counter[str] = field(default_factory=Counter)
    faults_at: list[float] = field(default_factory=list)
    recovered_seconds: list[float] = field(default_factory=list)
    wrongs: list[str] = field(default_factory=list)
    notes: Json = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.system.folder / f"ledger-{self.promise}.jsonl")
        self.client = Client(self.system, self.ledger, random.Random(self.rng.random()))
        self.began = time.monotonic()
        self.client.prepare()

    @property
    def is_over(self) -> bool:
        return self.faults.total() >= self.target or time.monotonic() - self.began > self.seconds

    def note(self, kind: str, number: int = 1) -> None:
        """Counts a fault that has been injected just now."""
        self.faults[kind] += number
        self.faults_at.append(time.time())

    def probe(self, num_jobs: int = 1) -> None:
        """Measures how long it takes, from now, until new jobs run to their end again."""
        began = time.monotonic()
        self.wait_for_end([self.client.submit("short") for _ in range(num_jobs)])
        self.recovered_seconds.append(time.monotonic() - began)

    def probe_prompt(self) -> None:
        """A prompt must be answered again before long."""

        def is_answered() -> bool:
            body = {"model": TEACHER, "prompt": "What is it?", "max_tokens": 4}
            answer = self.client.call("POST", "/v1/completions", json=body)
            return answer is not None and answer.status_code == 200

        try:
            wait_until(is_answered, PROBE_SECONDS, "prompts are not answered after the fault")
        except AssertionError as error:
            self.wrongs.append(str(error))

    def _has_ended(self, job: Accepted) -> bool:
        return self.client.status(job.job_id) in TERMINAL

    def wait_for_end(self, jobs: list[Accepted], seconds: float = PROBE_SECONDS) -> None:
        for job in jobs:
            try:
                wait_until(partial(self._has_ended, job), seconds, job.job_id)
            except AssertionError:
                self.wrongs.append(f"{job.job_id} has not ended {seconds:.0f} s after the fault")

    def query(self, text: str, *values: object) -> list[tuple[Any, ...]]:  # Any: columns
        with self.system.connect() as connection:
            return connection.execute(text, values).fetchall()

    def start_long(self) -> Accepted:
        """A training that goes on until `end_long`, and is under way."""
        job = self.client.submit("long")
        wait_until(lambda: self.query("SELECT 1 FROM job_metrics WHERE job_id = %s LIMIT 1", job.job_id),
                   PROBE_SECONDS, "the long training does not start")  # fmt: skip
        return job

    def end_long(self, job: Accepted) -> None:
        """Cancels it; it must never have lost a worker."""
        ((losses, attempts),) = self.query(
            "SELECT num_losses, attempt FROM jobs WHERE id = %s", job.job_id
        )
        if (losses, attempts) != (0, 1):
            self.wrongs.append(
                f"{job.job_id}: the running training was lost {losses} times ({attempts} attempts)"
            )
        self.client.command(job.job_id, "cancel")
        self.ledger.expect(job.job_id, "cancelled")

    def judge(self, settle_seconds: float) -> Figures:
        """Heals everything, waits, and lets the checker look."""
        self.system.network.heal()
        for program in self.system.programs.values():
            program.send(signal.SIGCONT)
        for path in self.system.crash_dir.iterdir():
            path.unlink()
        for url in self.system.api_urls:
            wait_until(partial(self.system.is_ready, url), START_SECONDS, f"{url} is not ready")
        settle(self.system, self.ledger, settle_seconds)
        verdict: Verdict = check(self.system, self.ledger, self.client, self.faults_at)
        self.wrongs += unaccounted_requests(self.system)
        self.client.close()
        self.ledger.close()
        notes = {**self.notes, "faults": dict(self.faults), "attempts": verdict.attempts}
        return Figures(
            promise=self.promise,
            faults=self.faults.total(),
            target=self.target,
            accepted=verdict.accepted,
            trained=verdict.trained,
            lost=len(verdict.lost),
            duplicated=len(verdict.duplicated),
            recovered_seconds=self.recovered_seconds or verdict.recovered_seconds,
            wrongs=[*self.wrongs, *verdict.wrongs],
            seconds=time.monotonic() - self.began,
            notes={**notes, "lost_attempts": verdict.lost_attempts},
        )


def percentile(values: list[float], percent: int) -> float | None:
    """The value below which so many of them lie; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, len(ordered) * percent // 100)], 2)


Run = Callable[[Trial], None]
