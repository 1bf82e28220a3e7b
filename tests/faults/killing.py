"""Faults of processes: killed at any time, at named points, stopped past their lease, told five times, cancelled."""

import itertools
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import psutil
from celery import Celery

from app.contracts.messages import TRAIN_QUEUE, WAKE_UP_TASK
from app.settings import Settings, celery_settings
from tests.faults.client import TERMINAL, Accepted
from tests.faults.prompts import prompts_asked
from tests.faults.system import Program, wait_until
from tests.faults.trial import Trial

SUBMIT_POINTS: Final = ("submit.inserted", "submit.committed", "submit.notified")
TRAINER_POINTS: Final = tuple(
    f"trainer.{name}" for name in ("begun", "halfway", "written", "listed", "renamed", "synced")
)
WORKER_POINTS: Final = (
    "claim.inside", "claim.committed", "inputs.prepared", "heartbeat.begun", "record.begun", "checkpoint.stored",
    "commit.begun", "checkpoint.committed", "model.stored", "finish.begun", "finish.inside", "model.registered",
    "fail.begun",
)  # fmt: skip
RECONCILE_POINTS: Final = ("reconcile.inside", "reconcile.committed")
ALL_POINTS: Final = (*SUBMIT_POINTS, *WORKER_POINTS, *TRAINER_POINTS, *RECONCILE_POINTS)
ZOMBIE_POINTS: Final = (
    "record.begun",
    "commit.begun",
    "finish.begun",
    "heartbeat.begun",
    "finish.inside",
)
JOBS_A_KILL: Final = 4
COPIES: Final = 5
POINTS_AT_ONCE: Final = 8  # for two jobs: each loss doubles the wait before the next attempt
MOST_OPEN: Final = 40
CANCEL_SECONDS: Final = 30.0


def kills(trial: Trial) -> None:
    """SIGKILL of a random process at a random time, while jobs come in and prompts are answered."""
    numbers = itertools.count()
    with prompts_asked(trial):
        while not trial.is_over:
            for _ in range(JOBS_A_KILL):
                trial.client.submit("trained" if next(numbers) % 20 == 0 else "short")
            time.sleep(trial.rng.uniform(0.1, 2.0))
            _kill_one(trial)
            while _num_open(trial) > MOST_OPEN and not trial.is_over:
                # so that as many jobs come as are wanted, and the workers get to them
                time.sleep(0.2)


def _kill_one(trial: Trial) -> None:
    role = trial.rng.choices(("train", "run", "api", "serve"), (4, 3, 2, 1))[0]
    victim = trial.rng.choice(trial.system.named("train" if role == "run" else role))
    if role == "run":
        run = victim.run_process()
        if run is not None:
            run.kill()
            trial.note(role)
    elif victim.send(signal.SIGKILL):
        trial.note(role)


def crash_points(trial: Trial) -> None:
    """Each named point in turn ends the process that passes it; the job goes on all the same."""
    points = set(ALL_POINTS)
    if trial.target < len(points):
        points = set(trial.rng.sample(ALL_POINTS, trial.target))
    while not trial.is_over:
        for point in sorted(points & set(SUBMIT_POINTS)):
            armed = trial.system.arm(point)
            trial.client.submit("short")
            _count_passed(trial, [armed])
        others = sorted(points - set(SUBMIT_POINTS))
        trial.rng.shuffle(others)
        for first in range(0, len(others), POINTS_AT_ONCE):
            if trial.is_over:
                break
            armed_points = [
                trial.system.arm(point) for point in others[first : first + POINTS_AT_ONCE]
            ]
            trial.wait_for_end(
                [trial.client.submit(kind) for kind in ("trained", "trained", "short")], 240
            )
            _count_passed(trial, armed_points)
    trial.notes["fewest_at_one_point"] = min(trial.faults[point] for point in points)


def _count_passed(trial: Trial, armed: Sequence[Path]) -> None:
    for path in armed:
        if path.exists():
            path.unlink()
            continue
        (taken,) = path.parent.glob(f".{path.name}.*")
        trial.faults[path.name] += 1
        # when it was taken away, a moment before the crash
        trial.faults_at.append(taken.stat().st_ctime)
        taken.unlink()


def zombies(trial: Trial) -> None:
    """A worker is stopped just before a write, past its lease, and goes on while its successor runs the job."""
    accepted = 0
    while not trial.is_over:
        point = trial.rng.choice(ZOMBIE_POINTS)
        job, zombie = _let_one_stop(trial, point)
        if zombie is None:
            continue
        others = [program for program in trial.system.named("train") if program is not zombie]
        for program in others:  # so that only the zombie can write
            program.send(signal.SIGSTOP)
        before = _written(trial, job)
        zombie.send(signal.SIGCONT)
        trial.note(point)
        time.sleep(1.0)
        after = _written(trial, job)
        for program in others:
            program.send(signal.SIGCONT)
        if after != before:
            accepted += 1
            trial.wrongs.append(
                f"{job.job_id}: the zombie wrote at {point}: {before} became {after}"
            )
        trial.wait_for_end([job])
    trial.notes["zombie_writes_accepted"] = accepted


def _let_one_stop(trial: Trial, point: str) -> tuple[Accepted, Program | None]:
    """A job whose first worker stands still at the point, and whose second one has just taken it.

    None if another worker stood still there, in what was left to do of the job before.
    """
    armed = trial.system.arm(point, "STOP")
    job = trial.client.submit("trained")
    wait_until(lambda: not armed.exists(), 300, f"nobody passes {point}")
    (zombie,) = _stopped(trial)
    taken = "SELECT 1 FROM jobs WHERE id = %s AND attempt >= 2"
    is_over = "SELECT 1 FROM jobs WHERE id = %s AND status = 'succeeded' AND attempt = 1"
    wait_until(
        lambda: trial.query(taken, job.job_id) or trial.query(is_over, job.job_id),
        120,
        "nobody takes the job over",
    )
    if trial.query(is_over, job.job_id):
        zombie.send(signal.SIGCONT)
        return job, None
    return job, zombie


def _stopped(trial: Trial) -> list[Program]:
    """The train workers that stand still."""
    found: list[Program] = []

    def look() -> bool:
        found[:] = [
            program
            for program in trial.system.named("train")
            if program.is_running and psutil.Process(program.pid).status() == psutil.STATUS_STOPPED
        ]
        return bool(found)

    wait_until(look, 10, "no worker stands still")
    return found


def _written(trial: Trial, job: Accepted) -> object:
    """What an attempt can write of a job, less what the job's new holder renews itself."""
    queries = (
        "SELECT status, attempt, lease_token, num_losses, result_model_id FROM jobs WHERE id = %s",
        "SELECT count(*) FROM job_events WHERE job_id = %s AND type IN ('metrics', 'checkpoint')",
        "SELECT count(*), max(created_at)::text FROM job_metrics WHERE job_id = %s",
        # those that a later one has replaced are taken away by the garbage collector, at its own time
        "SELECT count(*) FROM checkpoints WHERE job_id = %s AND status <> 'deleting'",
        "SELECT count(*) FROM models WHERE source_job_id = %s",
    )
    return [trial.query(text, job.job_id) for text in queries]


def duplicates(trial: Trial) -> None:
    """Delivers every wake-up message five times; the effects are those of one."""
    producer = Celery("faults", set_as_current=False)
    producer.conf.update(celery_settings(Settings(redis_url=trial.system.valkey.url)))
    num_messages = 0
    while not trial.is_over:
        num_jobs = min(50, trial.target - trial.faults.total())
        trained = {0} if num_jobs >= 50 or trial.faults.total() == 0 else set()
        jobs = []
        for number in range(num_jobs):
            jobs.append(trial.client.submit("trained" if number in trained else "short"))
            for _ in range(COPIES - 1):
                producer.send_task(WAKE_UP_TASK, queue=TRAIN_QUEUE, declare=[])
                num_messages += 1
        trial.wait_for_end(jobs, 240)
        trial.note("job", num_jobs)
    ids = [accepted.job_id for accepted in trial.ledger.accepted]
    twice = trial.query("SELECT id, attempt FROM jobs WHERE id = ANY(%s) AND attempt <> 1", ids)
    trial.wrongs += [
        f"{job_id}: {attempts} attempts without any fault" for job_id, attempts in twice
    ]
    trial.notes["messages_beside_the_first"] = num_messages


def idempotency(trial: Trial) -> None:
    """The same key fifty times at once, now and then with an API killed under it; one job comes of it."""
    tells: dict[str, int] = {}
    with ThreadPoolExecutor(50) as pool:
        while not trial.is_over:
            key = trial.client.new_key("same")
            trial.ledger.ask(key)
            asked = [pool.submit(trial.client.post_job, "short", key) for _ in range(50)]
            if trial.rng.random() < 0.1:
                time.sleep(trial.rng.uniform(0.0, 0.3))
                trial.rng.choice(trial.system.named("api")).send(signal.SIGKILL)
                trial.notes["apis_killed"] = trial.notes.get("apis_killed", 0) + 1
            answers = [future.result() for future in asked]
            for answer in answers:
                word = "none" if answer is None else str(answer.status_code)
                tells[word] = tells.get(word, 0) + 1
                if answer is not None and answer.status_code == 200:
                    trial.ledger.accept(Accepted(key, answer.json()["id"], ("failed",)))
                elif answer is not None and answer.status_code not in {409, 503}:
                    trial.wrongs.append(f"{key}: {answer.status_code} {answer.text[:200]}")
            trial.client.submit("short", key=key)
            other = None
            while other is None or other.status_code in {500, 502, 503}:
                other = trial.client.post_job("short", key, seed=4)
            if other.status_code != 422:
                trial.wrongs.append(f"{key}: another body was answered {other.status_code}")
            trial.note("key")
    trial.notes["answers"] = tells


def cancels(trial: Trial) -> None:
    """Cancel at any moment of a job's life: waiting, starting, training, paused, or just lost by its worker."""
    slowest = 0.0
    with ThreadPoolExecutor(4) as pool:
        while not trial.is_over:
            dice = [(trial.rng.random(), trial.rng.uniform(0.0, 8.0)) for _ in range(8)]
            for seconds in pool.map(lambda pair: _cancel_one(trial, *pair), dice):
                slowest = max(slowest, seconds)
                trial.recovered_seconds.append(seconds)
                trial.note("cancel")
    trial.notes["slowest_seconds"] = round(slowest, 2)


def _cancel_one(trial: Trial, dice: float, wait_seconds: float) -> float:
    """Gives the seconds from the cancel to the end of the job."""
    job = trial.client.submit("long" if dice < 0.8 else "trained")
    time.sleep(wait_seconds)
    if dice < 0.15:
        trial.client.command(job.job_id, "pause")
        time.sleep(wait_seconds / 8)
    elif dice < 0.3:
        for program in trial.system.named("train"):
            run = program.run_process()
            if run is not None:
                run.kill()
                break
    status = trial.client.command(job.job_id, "cancel")
    began = time.monotonic()
    if status == 200:
        trial.ledger.expect(job.job_id, "cancelled")
    else:
        trial.ledger.expect(job.job_id, "succeeded")
    while trial.client.status(job.job_id) not in TERMINAL:
        if time.monotonic() - began > CANCEL_SECONDS:
            trial.wrongs.append(f"{job.job_id}: not over {CANCEL_SECONDS:.0f} s after its cancel")
            break
        time.sleep(0.05)
    return time.monotonic() - began


def _num_open(trial: Trial) -> int:
    ((count,),) = trial.query(
        "SELECT count(*) FROM jobs WHERE status NOT IN ('succeeded', 'failed', 'cancelled')"
    )
    return int(count)
