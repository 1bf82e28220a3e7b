"""A train worker whose queue is silent still finds what is due, and never does two things at once."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import redis

from app.contracts.messages import ArtifactRef, ImportJob
from app.db import jobs
from app.db.session import transaction
from app.settings import Settings
from tests.faults.proxy import Network
from tests.faults.system import through
from tests.waiting import wait_for
from tests.worker.test_main import Process
from worker.watchdog import Inbox, WorkLoop


def add_job_without_input() -> None:
    """It is claimed and fails at once: no trainer is started."""
    staged = ArtifactRef(key="imports/gone", bytes=1, sha256="a" * 64)
    spec = ImportJob(output_model="m", staged=staged, format="folder")
    with transaction() as session:
        jobs.insert_job(
            session,
            id="import-1",
            project_id="p",
            kind="import",
            model_id="m",
            spec=spec.model_dump(mode="json"),
        )


def status() -> str | None:
    with transaction() as session:
        return jobs.status_of(session, "import-1")


def test_a_worker_whose_broker_fell_silent_still_takes_jobs_and_drains(
    database: str, valkey: str, settings_env: Callable[..., Settings], tmp_path: Path
) -> None:
    network = Network()
    link = network.add("train-valkey", urlsplit(valkey).port or 0)
    settings_env(
        database_url=database, redis_url=through(valkey, link.port), ring_again_seconds=0.5
    )
    worker = Process("train", tmp_path / "log")
    try:
        worker.wait_for_log("worker_ready", 60)
        link.blackhole()
        add_job_without_input()
        wait_for(lambda: status() == "failed", 60, "the job was not taken")
        link.heal()
        assert worker.stop() == 0
    finally:
        worker.process.kill()
        network.close()


def test_turns_never_overlap_and_the_last_one_is_waited_for() -> None:
    at_work, most_at_once, num_turns = [0], [0], [0]
    lock = threading.Lock()

    def work() -> int:
        with lock:
            at_work[0] += 1
            most_at_once[0] = max(most_at_once[0], at_work[0])
        time.sleep(0.02)
        with lock:
            at_work[0] -= 1
            num_turns[0] += 1
        return 1

    with WorkLoop(work, every_seconds=0.01) as work_loop:
        threads = [threading.Thread(target=work_loop.wake_up) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_for(
            lambda: num_turns[0] > len(threads), 10, "nothing is done without a wake-up message"
        )
    assert (most_at_once[0], at_work[0]) == (1, 0)


def test_a_look_that_fails_is_not_the_last() -> None:
    num_looks = [0]

    def work() -> int:
        num_looks[0] += 1
        raise RuntimeError("no luck")

    with WorkLoop(work, every_seconds=0.01):
        wait_for(lambda: num_looks[0] > 2, 10, "there was one look only")


def test_a_message_that_nobody_reads_is_told_once_and_one_that_is_read_is_not(valkey: str) -> None:
    told: list[float] = []
    with redis.Redis.from_url(valkey) as client:
        inbox = Inbox(
            lambda: client.lindex("inbox", -1),
            lambda: told.append(time.monotonic()),
            faults=(redis.RedisError,),
            silence_seconds=0.4,
        )
        inbox.start()
        for number in range(20):  # read as fast as they come: each is another oldest message
            client.lpush("inbox", number)
            time.sleep(0.05)
            client.rpop("inbox")
        assert told == []
        client.lpush("inbox", "unread")
        wait_for(lambda: told, 10, "the silence was not noticed")
        time.sleep(0.6)
        assert len(told) == 1


def test_a_broker_that_is_away_is_no_silence() -> None:
    told: list[bool] = []

    def oldest() -> object:
        raise redis.ConnectionError("away")

    inbox = Inbox(
        oldest, lambda: told.append(True), faults=(redis.RedisError,), silence_seconds=0.1
    )
    inbox.start()
    time.sleep(0.5)
    assert told == []
