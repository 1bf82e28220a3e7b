"""Reads the database, the store and the API after the faults, and knows nothing of the service's own code.

What it finds wrong it says in sentences; a good run gives none.
"""

import hashlib
import itertools
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, LiteralString

import httpx
import psycopg
from psycopg import sql
from psycopg.rows import dict_row, scalar_row

from tests.faults.client import TERMINAL, Client, Ledger
from tests.faults.history import History
from tests.faults.system import System, wait_until
from tests.scrapes import missing_ends, scrape

SETTLE_SECONDS: Final = 240.0
REQUEST_SECONDS: Final = 60.0  # for the requests of clients that have left
Row = dict[str, Any]  # Any: a row of the database


@dataclass
class Verdict:
    """What became of what was accepted."""

    accepted: int = 0
    trained: int = (
        0  # accepted jobs that made at least one training step; the others end without a trainer
    )
    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    attempts: int = 0
    lost_attempts: int = 0
    recovered_seconds: list[float] = field(default_factory=list)

    @property
    def wrongs(self) -> list[str]:
        return [*self.lost, *self.duplicated]


def settle(system: System, ledger: Ledger, seconds: float = SETTLE_SECONDS) -> None:
    """Waits until every accepted job has ended, or none has for so many seconds: a backlog takes its time, a lost job
    never ends."""
    ids = [accepted.job_id for accepted in ledger.accepted]
    query = "SELECT count(*) FROM jobs WHERE id = ANY(%s) AND status NOT IN ('succeeded', 'failed', 'cancelled')"
    fewest, deadline = len(ids) + 1, 0.0
    with system.connect() as connection:
        cursor = connection.cursor(row_factory=scalar_row)
        while True:
            num_open = cursor.execute(query, (ids,)).fetchone() or 0
            if num_open < fewest:
                fewest, deadline = num_open, time.monotonic() + seconds
            if num_open == 0 or time.monotonic() > deadline:
                return
            time.sleep(0.2)


def check(
    system: System, ledger: Ledger, client: Client, faults_at: list[float] | None = None
) -> Verdict:
    """Compares the ledger with what there is. `faults_at`: seconds since the epoch of each fault."""
    verdict = Verdict(accepted=len(ledger.accepted))
    ids = [accepted.job_id for accepted in ledger.accepted]
    with system.connect() as connection:
        cursor = connection.cursor(row_factory=dict_row)

        def rows(query: str, *values: object) -> list[Row]:
            return cursor.execute(query, values).fetchall()

        jobs = {row["id"]: row for row in rows("SELECT * FROM jobs WHERE id = ANY(%s)", ids)}
        attempts = _by_job(
            rows("SELECT * FROM job_attempts WHERE job_id = ANY(%s) ORDER BY attempt", ids),
            "job_id",
        )
        ends = _by_job(
            rows(
                "SELECT job_id, data->>'status' AS status FROM job_events "
                "WHERE type = 'state' AND job_id = ANY(%s)",
                ids,
            ),
            "job_id",
        )
        models = _by_job(
            rows("SELECT * FROM models WHERE source_job_id = ANY(%s)", ids), "source_job_id"
        )
        checkpoints = _by_job(
            rows("SELECT * FROM checkpoints WHERE job_id = ANY(%s)", ids), "job_id"
        )
        told_by_job = histories(connection, ids)
        of_key = rows(
            "SELECT metadata->>'key' AS key, count(*) AS num FROM jobs "
            "WHERE metadata->>'key' = ANY(%s) GROUP BY 1",
            list(ledger.asked),
        )
        verdict.trained = rows(
            "SELECT count(DISTINCT job_id) AS num FROM job_metrics WHERE name = 'train_loss' AND job_id = ANY(%s)",
            ids,
        )[0]["num"]
    verdict.duplicated += [
        f"{row['key']}: {row['num']} jobs of one key" for row in of_key if row["num"] > 1
    ]
    verdict.duplicated += [
        f"{key}: one key was answered with two jobs" for key in ledger.contradictions
    ]
    for history in told_by_job:
        history.judge()
        verdict.lost += history.lost
        verdict.duplicated += history.duplicated
    for accepted in ledger.accepted:
        job = jobs.get(accepted.job_id)
        if job is None:
            verdict.lost.append(f"{accepted.job_id}: accepted, and not there")
            continue
        mine = attempts.get(job["id"], [])
        verdict.lost += _of_state(job, accepted.expected)
        verdict.duplicated += _of_ends(job["id"], ends.get(job["id"], []), mine)
        verdict.duplicated += _of_model(system, job, models.get(job["id"], []), mine)
        verdict.duplicated += _of_checkpoints(job["id"], checkpoints.get(job["id"], []), mine)
        verdict.attempts += len(mine)
        verdict.lost_attempts += sum(attempt["outcome"] == "lost" for attempt in mine)
        verdict.recovered_seconds += _recoveries(mine, faults_at or [])
    for accepted in ledger.accepted[
        :: max(1, len(ledger.accepted) // 50)
    ]:  # the API tells the same
        told = client.status(accepted.job_id)
        if told not in TERMINAL or told != jobs.get(accepted.job_id, {}).get("status"):
            verdict.lost.append(f"{accepted.job_id}: the API says {told}")
    return verdict


def histories(connection: psycopg.Connection[Any], ids: list[str]) -> list[History]:
    """The rows and events of each of these jobs."""
    cursor = connection.cursor(row_factory=dict_row)

    def rows(table: str, order: LiteralString, column: str = "job_id") -> list[Row]:
        query = sql.SQL("SELECT * FROM {} WHERE {} = ANY(%s) ORDER BY " + order)
        return cursor.execute(
            query.format(sql.Identifier(table), sql.Identifier(column)), (ids,)
        ).fetchall()

    jobs = rows("jobs", "id", "id")
    attempts = _by_job(rows("job_attempts", "attempt"), "job_id")
    events = _by_job(rows("job_events", "seq"), "job_id")
    metrics = _by_job(rows("job_metrics", "step"), "job_id")
    checkpoints = _by_job(rows("checkpoints", "step"), "job_id")
    return [
        History(
            job=job,
            attempts=attempts.get(job["id"], []),
            events=events.get(job["id"], []),
            metrics=metrics.get(job["id"], []),
            checkpoints=checkpoints.get(job["id"], []),
        )
        for job in jobs
    ]


def _of_state(job: Row, expected: tuple[str, ...]) -> list[str]:
    if job["status"] not in TERMINAL:
        return [f"{job['id']}: still {job['status']}"]
    if job["status"] not in expected:
        return [f"{job['id']}: {job['status']} where {expected} was due ({job['error']})"]
    return []


def _of_ends(job_id: str, states: list[Row], attempts: list[Row]) -> list[str]:
    wrongs = []
    ends = [row["status"] for row in states if row["status"] in TERMINAL]
    if (
        len([end for end in ends if end != "failed"]) > 1
    ):  # a failed job can be resumed; see history.py
        wrongs.append(f"{job_id}: ended {len(ends)} times ({ends})")
    tokens = [attempt["lease_token"] for attempt in attempts]
    if tokens != sorted(set(tokens)):
        wrongs.append(f"{job_id}: lease tokens do not rise: {tokens}")
    open_attempts = [a["attempt"] for a in attempts if a["ended_at"] is None]
    if open_attempts and ends:
        wrongs.append(f"{job_id}: ended, with open attempts {open_attempts}")
    outcomes = Counter(attempt["outcome"] for attempt in attempts)
    if sum(outcomes[name] for name in TERMINAL - {"failed"}) > 1:
        wrongs.append(f"{job_id}: two attempts ended it ({dict(outcomes)})")
    return wrongs


def _of_model(system: System, job: Row, models: list[Row], attempts: list[Row]) -> list[str]:
    wanted = 1 if job["status"] == "succeeded" else 0
    if len(models) != wanted:
        return [f"{job['id']}: {job['status']}, with {len(models)} models"]
    wrongs = []
    for model in models:
        token = str(attempts[-1]["lease_token"])
        if model["store_key"].split("/")[-1] != token:
            wrongs.append(
                f"{job['id']}: the model is of another lease than {token}: {model['store_key']}"
            )
        wrongs += _unreadable(
            system.data_dir / "store", model["store_key"], model["manifest_sha256"]
        )
    return wrongs


def _of_checkpoints(job_id: str, checkpoints: list[Row], attempts: list[Row]) -> list[str]:
    """A checkpoint whose row is younger than the end of its lease was written by a zombie."""
    ended = {attempt["lease_token"]: attempt["ended_at"] for attempt in attempts}
    return [
        f"{job_id}: checkpoint {row['step']} committed by lease {row['lease_token']} after its end"
        for row in checkpoints
        if (end := ended.get(row["lease_token"])) is not None and row["created_at"] > end
    ]


def unreadable_checkpoints(system: System) -> list[str]:
    """Of all committed checkpoints, those that are not what their manifest says.

    The garbage collector may delete a checkpoint during this check. It marks the row first, so a
    fault counts only if the row is still committed afterwards.
    """
    faults = {
        key: wrongs
        for key, sha256 in _committed_checkpoints(system).items()
        if (wrongs := _unreadable(system.data_dir / "store", key, sha256))
    }
    if not faults:
        return []
    still_committed = _committed_checkpoints(system)
    return [wrong for key, wrongs in faults.items() if key in still_committed for wrong in wrongs]


def _committed_checkpoints(system: System) -> dict[str, str]:
    query = "SELECT store_key, manifest_sha256 FROM checkpoints WHERE status = 'committed'"
    with system.connect() as connection:
        return {str(key): str(sha256) for key, sha256 in connection.execute(query)}


def _unreadable(store: Path, key: str, sha256: object) -> list[str]:
    try:
        manifest = (store / key / "_manifest.json").read_bytes()
        files = json.loads(manifest)["files"]
        whole = all(
            hashlib.sha256((store / key / file["path"]).read_bytes()).hexdigest() == file["sha256"]
            for file in files
        )
    except (OSError, ValueError, KeyError) as error:
        return [f"{key}: unreadable ({error})"]
    if hashlib.sha256(manifest).hexdigest() != sha256 or not whole:
        return [f"{key}: not what was stored"]
    return []


def _is_accounted(http: httpx.Client, url: str) -> bool:
    return missing_ends(scrape(http, url)) == 0


def unaccounted_requests(system: System) -> list[str]:
    """Sentences about requests that an API process counts as started, but not as ended."""
    wrongs = []
    headers = {"Authorization": f"Bearer {system.admin_key}"}
    with httpx.Client(headers=headers, timeout=20, trust_env=False) as http:
        for url in system.api_urls:
            try:
                wait_until(
                    partial(_is_accounted, http, url),
                    REQUEST_SECONDS,
                    f"{url}: requests have started, but neither completed, aborted nor failed",
                )
            except AssertionError as error:
                wrongs.append(str(error))
    return wrongs


def _recoveries(attempts: list[Row], faults_at: list[float]) -> list[float]:
    """From the fault that cost an attempt to the begin of the next one, in seconds."""
    found = []
    for dead, heir in itertools.pairwise(attempts):
        begun, ended = dead["started_at"].timestamp(), dead["ended_at"].timestamp()
        blame = [at for at in faults_at if begun <= at <= ended]
        if dead["outcome"] == "lost" and blame:
            found.append(heir["started_at"].timestamp() - blame[0])
    return found


def _by_job(rows: list[Row], column: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row[column], []).append(row)
    return found
