"""Benchmark of submissions and of the status routes beside a long history of jobs that have ended.

    .venv/bin/python bench/submission.py [--jobs 1000 100000 1000000] [--calls 50] [--json FILE]

Starts a Postgres (with its default durability) and a Valkey of its own, fills the table of jobs by SQL, and prints
median milliseconds per call of the functions behind the routes.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table
from sqlalchemy import text

from app.auth import Principal
from app.contracts.messages import ModelFacts
from app.db import files, jobs, models
from app.db.health_checks import ping
from app.db.schema.migrate import upgrade
from app.db.session import Session, engine, transaction
from app.local.embedded_servers import LocalPostgres, LocalValkey
from app.local.process_manager import set_environment
from app.schemas.jobs import CreateJob
from app.services.jobs import create_job
from app.services.retries import RetryInfo
from app.settings import get_settings
from bench.distill import machine

PROJECT = "bench"
MODEL, FILE = "tiny", "file-bench"
CALLER = Principal(PROJECT, "bench", frozenset({"jobs:write"}))
ASKED = CreateJob.model_validate(
    {
        "model": MODEL,
        "training_file": FILE,
        "method": {"type": "distillation", "distillation": {"teacher": MODEL}},
    }
)
FACTS = ModelFacts(
    architecture="llama",
    num_layers=4,
    hidden_size=64,
    vocab_size=384,
    context_tokens=256,
    num_parameters=100_000,
    tokenizer_sha256="t" * 64,
    has_chat_template=True,
    weights_bytes=400_000,
    weights_sha256="w" * 64,
)
FILL = """
INSERT INTO jobs (id, project_id, kind, status, spec, model_id, training_file_id, request_sha256,
                  created_by_key_id, created_at, finished_at, error)
SELECT 'ftjob-' || n, :project, 'distillation', status, '{}', 'ds:' || n, :file, 'other', 'bench',
       now() - (2000000 - n) * interval '1 second', now(), CASE WHEN status = 'failed' THEN '{}'::jsonb END
FROM (SELECT n, (ARRAY['succeeded', 'failed', 'cancelled'])[1 + n % 3] AS status
      FROM generate_series(CAST(:first AS int), CAST(:last AS int)) AS n) AS numbered
"""
COUNT = "INSERT INTO job_counts (status, delta) SELECT status, count(*) FROM jobs GROUP BY status"


def main() -> int:
    arguments = parse()
    results: dict[int, dict[str, float]] = {}
    with databases():
        add_inputs()
        num_jobs = 0
        for target in sorted(arguments.jobs):
            fill(num_jobs + 1, target)
            num_jobs = target
            results[target] = measure(arguments.calls)
    show(results)
    if arguments.json:
        report = {"machine": machine(), "median_ms": results}
        arguments.json.write_text(json.dumps(report, indent=1))
    return 0


@contextmanager
def databases() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="still-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)  # the servers run as another user if we are root
        with LocalPostgres(folder) as postgres, LocalValkey(folder) as valkey:
            set_environment(
                {
                    "STILLHOUSE_DATA_DIR": name,
                    "STILLHOUSE_DATABASE_URL": postgres.url,
                    "STILLHOUSE_REDIS_URL": valkey.url,
                    "STILLHOUSE_MIN_FREE_BYTES": "0",
                }
            )
            upgrade(get_settings().database_url)
            yield
            engine().dispose()


def add_inputs() -> None:
    with transaction() as session:
        models.insert_model(
            session,
            id=MODEL,
            project_id=PROJECT,
            origin="imported",
            store_key="models/tiny",
            bytes=1,
            manifest_sha256="0" * 64,
            facts=FACTS.model_dump(mode="json"),
        )
        files.insert_file(
            session,
            id=FILE,
            project_id=PROJECT,
            filename="rows.jsonl",
            purpose="fine-tune",
            bytes=1,
            sha256="0" * 64,
            store_key="files/bench",
            format="prompt",
            num_rows=100,
            max_row_bytes=10,
        )


def fill(first: int, last: int) -> None:
    """Adds ended jobs. Triggers are off meanwhile, and the counters are made anew."""
    with transaction() as session:
        session.execute(text("SET LOCAL session_replication_role = replica"))
        session.execute(text("SET LOCAL statement_timeout = 0"))
        session.execute(
            text(FILL), {"project": PROJECT, "file": FILE, "first": first, "last": last}
        )
        session.execute(text("DELETE FROM job_counts"))
        session.execute(text(COUNT))
    with engine().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("SET statement_timeout = 0"))
        connection.execute(text("VACUUM (ANALYZE) jobs, job_counts"))


def measure(num_calls: int) -> dict[str, float]:
    submissions, retries = [], []
    for _ in range(num_calls):
        began = time.perf_counter()
        created = create_job(CALLER, ASKED, RetryInfo())
        submissions.append(time.perf_counter() - began)
        began = time.perf_counter()
        repeated = create_job(CALLER, ASKED, RetryInfo(retry_count=1))
        retries.append(time.perf_counter() - began)
        assert repeated.body["id"] == created.body["id"]
        with transaction() as session:
            jobs.request_cancel(session, created.body["id"])
    return {
        "submission": milliseconds(submissions),
        "retry": milliseconds(retries),
        "ready": timed(ping, num_calls),
        "metrics": timed(jobs.count_by_status, num_calls),
        "list": timed(
            lambda session: jobs.page_jobs(session, PROJECT, kind="distillation"), num_calls
        ),
    }


def timed(query: Callable[[Session], object], num_calls: int) -> float:
    seconds = []
    for _ in range(num_calls):
        began = time.perf_counter()
        with transaction() as session:
            query(session)
        seconds.append(time.perf_counter() - began)
    return milliseconds(seconds)


def milliseconds(seconds: Sequence[float]) -> float:
    return round(1000 * median(seconds), 2)


def show(results: dict[int, dict[str, float]]) -> None:
    table = Table("ended jobs", *next(iter(results.values())), title="median ms per call")
    for num_jobs, row in results.items():
        table.add_row(f"{num_jobs:,}", *(f"{value:.2f}" for value in row.values()))
    Console().print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--calls", type=int, default=50)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
