"""Faults of what the processes talk through: Valkey, Postgres, and each link between them and a client."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from tests.faults.prompts import prompts_asked
from tests.faults.system import LEASE_SECONDS
from tests.faults.trial import Trial

LONG_OUTAGE_SECONDS: Final = 1.5 * LEASE_SECONDS
DATA_LINKS: Final = ("api-postgres", "train-postgres", "client-api-1")
MESSAGE_LINKS: Final = ("api-valkey", "train-valkey", "serve-valkey")


def valkey(trial: Trial) -> None:
    """Valkey killed and empty again, flushed, or away for a while: jobs are accepted, and no training is touched."""
    long = trial.start_long()
    while not trial.is_over:
        kind = trial.rng.choices(("kill", "flushall", "down"), (10, 2, 2))[0]
        jobs = []
        if kind == "flushall":
            jobs.append(trial.client.submit("short"))
            with trial.system.valkey_client() as client:
                client.flushall()
        else:
            trial.system.kill_valkey()
            began = time.monotonic()
            jobs.append(trial.client.submit("short", seconds=20))
            if kind == "down":
                time.sleep(min(60.0, max(3.0, trial.seconds / 20)))
                jobs.append(trial.client.submit("short", seconds=20))
            trial.notes["longest_down_s"] = round(
                max(trial.notes.get("longest_down_s", 0.0), time.monotonic() - began), 1
            )
            trial.system.start_valkey()
        trial.note(kind)
        began = time.monotonic()
        trial.wait_for_end(jobs)
        trial.recovered_seconds.append(time.monotonic() - began)
        trial.probe_prompt()
    trial.end_long(long)


def postgres(trial: Trial) -> None:
    """Crashes Postgres, ends its backends, and stops it for longer than a lease.

    No lease of a live worker may expire.
    """
    long = trial.start_long()
    is_first = True
    while not trial.is_over:
        if is_first or trial.rng.random() < 0.03:
            _restart(trial, LONG_OUTAGE_SECONDS)
            trial.note("long_outage")
            is_first = False
            time.sleep(2 * LEASE_SECONDS)  # time enough for a lease to expire wrongly
        elif trial.rng.random() < 0.3:
            _restart(trial, trial.rng.uniform(0.2, 2.0))
            trial.note("restart")
        else:
            ended = trial.query(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() ORDER BY random() LIMIT 3"
            )
            trial.note("backend", len(ended))
        trial.probe()
    trial.end_long(long)
    expiries = trial.query(
        "SELECT job_id FROM job_events WHERE message LIKE 'The worker has stopped responding%%'"
    )
    expired = {str(job_id) for (job_id,) in expiries} & {
        known.job_id for known in trial.ledger.accepted
    }
    trial.wrongs += [
        f"{job_id}: its lease expired though its worker lived" for job_id in sorted(expired)
    ]
    trial.notes["wrongly_expired"] = len(expired)


def _restart(trial: Trial, seconds: float) -> None:
    """Requests that come meanwhile must be accepted afterwards, once each."""
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(trial.client.submit, "short") for _ in range(2)]
        trial.system.stop_postgres()
        time.sleep(seconds)
        trial.system.postgres.start()
        began = time.monotonic()
        trial.wait_for_end([future.result() for future in asked])
        trial.recovered_seconds.append(time.monotonic() - began)


def data_links(trial: Trial) -> None:
    """The links to Postgres and of a client."""
    _links(trial, DATA_LINKS)


def message_links(trial: Trial) -> None:
    """The links to Valkey, with prompts on their way."""
    with prompts_asked(trial):
        _links(trial, MESSAGE_LINKS)


def _links(trial: Trial, names: Sequence[str]) -> None:
    """Each link in turn swallows everything, resets everything, or is slow, for a shorter or longer time."""
    faults = ("blackhole", "reset", "cut", "delay")
    pairs = [(name, fault) for name in names for fault in faults]
    while not trial.is_over:
        trial.rng.shuffle(pairs)
        for name, fault in pairs:
            if trial.is_over:
                return
            link = trial.system.network.links[name]
            with ThreadPoolExecutor(3) as pool:
                asked = [pool.submit(trial.client.submit, "short") for _ in range(3)]
                {
                    "blackhole": link.blackhole,
                    "reset": link.reset,
                    "cut": link.cut,
                    "delay": lambda link=link: link.delay(0.3),  # type: ignore[misc]  # a default binds the loop's value
                }[fault]()
                time.sleep(
                    trial.rng.uniform(0.5, 1.5 * LEASE_SECONDS if fault == "blackhole" else 3.0)
                )
                link.heal()
                trial.note(f"{name} {fault}")
                began = time.monotonic()
                trial.wait_for_end([future.result() for future in asked])
                trial.recovered_seconds.append(time.monotonic() - began)
            trial.probe_prompt()
