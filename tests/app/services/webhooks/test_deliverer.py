"""Events reach their receivers at least once, whatever happens to receiver, service and database."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from pathlib import Path

import openai
import pytest
import structlog
from sqlalchemy import text

from app.db.session import transaction
from app.db.webhooks import deliveries, endpoints
from app.schemas.webhooks.endpoints import UpdateEndpoint
from app.services.webhooks.address_guard import AddressGuard
from app.services.webhooks.deliverer import LEASE_SECONDS, DelivererThread
from app.services.webhooks.endpoints import update_endpoint
from app.services.webhooks.signatures import new_secret
from app.settings import Settings
from tests.app.services.webhooks.conftest import Clock, deliver, deliveries_of
from tests.waiting import wait_for
from tests.webhook_receiver import Received, Receiver, open_receiver

ROOT = Path(__file__).resolve().parents[4]


def unwrap(received: Received, secret: str) -> object:
    with openai.OpenAI(api_key="x", webhook_secret=secret) as client:
        return client.webhooks.unwrap(received.body, received.headers)


def object_ids(receiver: Receiver) -> list[str]:
    return sorted(received.object_id for received in receiver.received)


def test_the_openai_client_accepts_a_delivered_event(
    receiver: Receiver,
    clock: Clock,
    add_endpoint: Callable[..., str],
    end_job: Callable[[str], str],
) -> None:
    secret = add_endpoint(receiver.url)
    end_job("ftjob-1")
    assert deliver(clock) == 1
    (received,) = receiver.received
    event = unwrap(received, secret)
    assert isinstance(event, openai.types.webhooks.FineTuningJobCancelledWebhookEvent)
    assert event.data.id == "ftjob-1"
    assert event.id == received.headers["webhook-id"]
    with pytest.raises(openai.InvalidWebhookSignatureError):
        unwrap(received, new_secret())
    assert deliveries_of("status", "num_attempts") == [("succeeded", 1)]
    clock.advance(days=2)
    assert deliver(clock) == 0


def test_a_receiver_that_is_down_for_a_day_gets_each_event(
    clock: Clock, add_endpoint: Callable[..., str], end_job: Callable[[str], str]
) -> None:
    with open_receiver(is_up=False) as receiver:
        add_endpoint(receiver.url)
        began = clock.now
        end_job("ftjob-1")
        end_job("ftjob-2")
        while (clock.now - began).total_seconds() < 86_400:
            assert deliver(clock) > 0
            clock.now = next_attempt_at()
        assert deliveries_of("status", "num_attempts") == [("pending", 9), ("pending", 9)]
        receiver.listen()
        clock.advance(hours=3)
        assert deliver(clock) == 2
        assert object_ids(receiver) == ["ftjob-1", "ftjob-2"]
        assert len({received.headers["webhook-id"] for received in receiver.received}) == 2


def next_attempt_at() -> datetime:
    times = [time for (time,) in deliveries_of("next_attempt_at") if isinstance(time, datetime)]
    return min(times)


def test_the_last_failed_attempt_fails_the_delivery_and_a_replay_begins_again(
    receiver: Receiver,
    clock: Clock,
    add_endpoint: Callable[..., str],
    end_job: Callable[[str], str],
) -> None:
    add_endpoint(receiver.url)
    end_job("ftjob-1")
    receiver.status = 500
    while deliver(clock):
        clock.advance(hours=7)
    assert deliveries_of("status", "num_attempts", "attempts->-1->'status_code'") == [
        ("failed", 10, 500)
    ]
    receiver.status = 204
    replay("we_1")
    clock.advance(seconds=1)
    assert deliver(clock) == 1
    assert deliveries_of("status", "num_attempts", "num_failures") == [("succeeded", 11, 0)]
    assert len({received.headers["webhook-id"] for received in receiver.received}) == 1
    replay("we_1")
    assert deliver(clock) == 1
    assert deliveries_of("status", "num_attempts") == [("succeeded", 12)]


def replay(endpoint_id: str) -> None:
    ((delivery_id,),) = deliveries_of("webhook_deliveries.id")
    with transaction() as session:
        assert deliveries.replay(session, endpoint_id, str(delivery_id)) is not None
        assert deliveries.replay(session, "we_other", str(delivery_id)) is None


def test_two_deliverers_share_the_work(
    receiver: Receiver,
    clock: Clock,
    add_endpoint: Callable[..., str],
    end_job: Callable[[str], str],
) -> None:
    for number in range(4):
        add_endpoint(receiver.url, f"we_{number}")
    ids = [end_job(f"ftjob-{number:02}") for number in range(12)]
    with ThreadPoolExecutor(2) as pool:
        counts = list(pool.map(lambda _: deliver(clock), range(2)))
    assert sum(counts) == 48
    assert object_ids(receiver) == sorted(4 * ids)  # each once, as none was killed
    assert {status for (status,) in deliveries_of("status")} == {"succeeded"}


def test_the_deliveries_of_a_killed_process_are_taken_over_and_its_late_results_refused(
    receiver: Receiver,
    clock: Clock,
    add_endpoint: Callable[..., str],
    end_job: Callable[[str], str],
) -> None:
    add_endpoint(receiver.url)
    end_job("ftjob-1")
    with transaction() as session:
        (killed,) = deliveries.claim(session, clock.now, lease_seconds=LEASE_SECONDS, most=9)
    clock.advance(seconds=LEASE_SECONDS - 1)
    assert deliver(clock) == 0
    clock.advance(seconds=1)
    receiver.status = 500
    assert deliver(clock) == 1
    result = deliveries.AttemptResult(clock.now, 0.1, 200, None)
    with transaction() as session:
        assert not deliveries.record_success(session, killed, result)
    assert deliveries_of("status", "num_attempts") == [("pending", 1)]


def test_a_process_that_is_killed_before_it_records_a_success_loses_nothing(
    receiver: Receiver,
    clock: Clock,
    add_endpoint: Callable[..., str],
    end_job: Callable[[str], str],
    settings_env: Callable[..., Settings],
    tmp_path: Path,
) -> None:
    add_endpoint(receiver.url)
    end_job("ftjob-1")
    settings_env(webhook_allowed_hosts="localhost")
    (tmp_path / "webhook.sent").touch()
    code = (
        "import asyncio, sys\n"
        "from app.crash_points import arm\n"
        "from app.services.webhooks.deliverer import Deliverer, webhook_guard\n"
        "arm(sys.argv[1])\n"
        "asyncio.run(Deliverer(webhook_guard()).deliver_due())\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, env=os.environ).returncode == -signal.SIGKILL
    assert object_ids(receiver) == ["ftjob-1"]
    clock.advance(seconds=LEASE_SECONDS)
    assert deliver(clock) == 1
    assert object_ids(receiver) == ["ftjob-1", "ftjob-1"]
    first, second = receiver.received
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.body == second.body


def test_a_result_is_recorded_although_the_database_ends_connections(
    receiver: Receiver,
    clock: Clock,
    add_endpoint: Callable[..., str],
    end_job: Callable[[str], str],
) -> None:
    add_endpoint(receiver.url)
    end_job("ftjob-1")

    def end_connections() -> None:
        others = "datname = current_database() AND pid != pg_backend_pid()"
        query = f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {others}"
        with transaction() as session:
            session.execute(text(query))

    receiver.before_answer = end_connections
    assert deliver(clock) == 1
    assert deliveries_of("status") == [("succeeded",)]


def test_both_secrets_sign_while_a_rotation_overlaps(
    receiver: Receiver,
    clock: Clock,
    add_endpoint: Callable[..., str],
    end_job: Callable[[str], str],
) -> None:
    old, new, newest = add_endpoint(receiver.url), new_secret(), new_secret()

    def rotate(secret: str, overlap_seconds: float) -> None:
        with transaction() as session:
            row = endpoints.find_endpoint(session, "p", "we_1", lock=True)
            assert row is not None
            endpoints.rotate_secret(session, row, secret, overlap_seconds=overlap_seconds)

    def accepting(job_id: str, *secrets: str) -> list[bool]:
        end_job(job_id)
        assert deliver(clock) == 1
        accepted = []
        for secret in secrets:
            try:
                unwrap(receiver.received[-1], secret)
                accepted.append(True)
            except openai.InvalidWebhookSignatureError:
                accepted.append(False)
        return accepted

    rotate(new, 3600.0)
    assert accepting("ftjob-1", old, new) == [True, True]
    clock.advance(hours=2)
    assert accepting("ftjob-2", old, new) == [False, True]
    rotate(newest, 0.0)
    assert accepting("ftjob-3", new, newest) == [False, True]


def test_a_receiver_that_is_gone_is_disabled_until_its_owner_enables_it(
    receiver: Receiver,
    clock: Clock,
    add_endpoint: Callable[..., str],
    end_job: Callable[[str], str],
) -> None:
    add_endpoint(receiver.url)
    end_job("ftjob-1")
    receiver.status = 410
    assert deliver(clock) == 1
    assert disabled_reason() == "the receiver answered with 410 (gone)"
    end_job("ftjob-2")
    clock.advance(days=1)
    assert deliver(clock) == 0
    receiver.status = 200
    with transaction() as session:
        endpoints.change_endpoint(session, "we_1", disabled_at=None, disabled_reason=None)
    assert deliver(clock) == 1
    assert object_ids(receiver) == ["ftjob-1", "ftjob-1"]


def test_an_endpoint_that_fails_for_days_is_disabled_and_a_success_ends_the_count(
    receiver: Receiver,
    clock: Clock,
    add_endpoint: Callable[..., str],
    end_job: Callable[[str], str],
) -> None:
    add_endpoint(receiver.url)
    receiver.status = 500
    reasons = []
    for number in range(2):
        end_job(f"ftjob-{number}")
        while deliver(clock):
            clock.advance(hours=7)
        reasons.append(disabled_reason())
    assert reasons == [
        None,
        "20 attempts in 5.5 days have failed, the last one with: the receiver answered with 500",
    ]

    receiver.status = 200
    with transaction() as session:
        endpoints.change_endpoint(session, "we_1", disabled_at=None, disabled_reason=None)
    end_job("ftjob-good")
    assert deliver(clock) == 1
    with transaction() as session:
        row = endpoints.find_endpoint(session, "p", "we_1")
        assert row is not None
        assert (row.num_failures, row.failing_since) == (0, None)


@pytest.mark.parametrize(
    ("reason", "is_enabled"), [("the receiver answered with 410 (gone)", True), (None, False)]
)
def test_a_new_url_forgets_failures_and_enables_what_the_service_has_disabled(
    database: str, add_endpoint: Callable[..., str], reason: str | None, is_enabled: bool
) -> None:
    add_endpoint("https://example.com/")
    update_endpoint("p", "we_1", UpdateEndpoint(enabled=False))
    with transaction() as session:
        now = deliveries.server_time(session)
        columns = {"disabled_reason": reason} if reason else {}
        endpoints.change_endpoint(session, "we_1", num_failures=9, failing_since=now, **columns)
    unmoved = update_endpoint("p", "we_1", UpdateEndpoint(url="https://example.com/"))
    assert (unmoved.enabled, unmoved.failing_since) == (False, int(now.timestamp()))
    moved = update_endpoint("p", "we_1", UpdateEndpoint(url="https://example.org/"))
    assert (moved.enabled, moved.failing_since) == (is_enabled, None)
    with transaction() as session:
        row = endpoints.find_endpoint(session, "p", "we_1")
        assert row is not None
        assert row.num_failures == 0


def disabled_reason() -> str | None:
    with transaction() as session:
        row = endpoints.find_endpoint(session, "p", "we_1")
        assert row is not None
        return row.disabled_reason


def test_a_receiver_can_ask_for_more_time(
    receiver: Receiver,
    clock: Clock,
    add_endpoint: Callable[..., str],
    end_job: Callable[[str], str],
) -> None:
    add_endpoint(receiver.url)
    end_job("ftjob-1")
    receiver.status, receiver.headers = 429, {"retry-after": "600"}
    assert deliver(clock) == 1
    receiver.status = 200
    clock.advance(seconds=599)
    assert deliver(clock) == 0
    clock.advance(seconds=1)
    assert deliver(clock) == 1


def test_a_slow_endpoint_does_not_take_all_places(
    receiver: Receiver,
    clock: Clock,
    add_endpoint: Callable[..., str],
    end_job: Callable[[str], str],
) -> None:
    add_endpoint(receiver.url)
    for number in range(8):
        end_job(f"ftjob-{number}")
    most = deliveries.CLAIMS_PER_ENDPOINT
    with transaction() as session:
        claimed = deliveries.claim(session, clock.now, lease_seconds=60, most=16)
        assert len(claimed) == most
        assert len(deliveries.claim(session, clock.now, lease_seconds=60, most=16)) == 8 - most
        clock.advance(seconds=61)
        claim = partial(deliveries.claim, session, clock.now, lease_seconds=60, most=16)
        assert claim(in_flight=claimed) == []


def test_a_project_with_several_slow_endpoints_does_not_take_all_places(
    clock: Clock, add_endpoint: Callable[..., str], end_job: Callable[..., str]
) -> None:
    for number in range(3):
        add_endpoint("http://localhost/", f"we_p{number}", "p")
    for number in range(4):
        end_job(f"ftjob-p{number}", "p")
    with transaction() as session:
        claim = partial(deliveries.claim, session, clock.now, lease_seconds=60)
        claimed = claim(most=16)
        assert len(claimed) == deliveries.CLAIMS_PER_PROJECT
        assert claim(most=16, in_flight=claimed) == []
        assert len(claim(most=16, in_flight=claimed[:4])) == deliveries.CLAIMS_PER_PROJECT - 4
    add_endpoint("http://localhost/", "we_q", "q")
    end_job("ftjob-q", "q")
    clock.advance(seconds=61)
    with transaction() as session:
        claim = partial(deliveries.claim, session, clock.now, lease_seconds=60)
        other = claim(most=16, in_flight=claimed)
        assert [delivery.project_id for delivery in other] == ["q"]


def test_a_claim_locks_only_the_deliveries_that_it_takes(
    clock: Clock, add_endpoint: Callable[..., str], end_job: Callable[..., str]
) -> None:
    add_endpoint("http://localhost/")
    for number in range(4):
        end_job(f"ftjob-{number}")
    with transaction() as session, transaction() as other:
        (first,) = deliveries.claim(session, clock.now, lease_seconds=60, most=1)
        others = deliveries.claim(other, clock.now, lease_seconds=60, most=16)
        assert len({first.id, *(delivery.id for delivery in others)}) == 4


def test_the_log_has_the_start_of_an_attempt_and_a_disabled_endpoint_is_reported_once(
    receiver: Receiver,
    clock: Clock,
    add_endpoint: Callable[..., str],
    end_job: Callable[..., str],
) -> None:
    add_endpoint(receiver.url)
    for number in range(2):
        end_job(f"ftjob-{number}")
    began = clock.now
    receiver.status = 410
    receiver.before_answer = lambda: clock.advance(seconds=1)
    with structlog.testing.capture_logs() as events:
        assert deliver(clock) == 2
    times = deliveries_of("(attempts->0->>'attempted_at')::int")
    assert times == [(int(began.timestamp()),)] * 2
    assert [event["event"] for event in events] == ["webhook_endpoint_disabled"]


def test_an_attempt_at_the_old_url_does_not_disable_the_endpoint_with_its_new_url(
    receiver: Receiver,
    clock: Clock,
    add_endpoint: Callable[..., str],
    end_job: Callable[..., str],
) -> None:
    add_endpoint(receiver.url)
    end_job("ftjob-1")

    def move() -> None:
        asked = UpdateEndpoint(url="https://example.com/")
        update_endpoint("p", "we_1", asked)

    receiver.before_answer = move
    receiver.status = 410
    assert deliver(clock) == 1
    assert disabled_reason() is None
    assert deliveries_of("status", "num_failures") == [("pending", 1)]


def test_an_endpoint_that_is_deleted_during_an_attempt_is_gone(
    receiver: Receiver,
    clock: Clock,
    add_endpoint: Callable[..., str],
    end_job: Callable[[str], str],
) -> None:
    add_endpoint(receiver.url)
    end_job("ftjob-1")

    def delete() -> None:
        with transaction() as session:
            assert endpoints.delete_endpoint(session, "p", "we_1")

    receiver.before_answer = delete
    assert deliver(clock) == 1
    assert deliveries_of("status") == []


def test_a_private_receiver_is_refused_at_each_attempt(
    receiver: Receiver,
    clock: Clock,
    add_endpoint: Callable[..., str],
    end_job: Callable[[str], str],
) -> None:
    """The host was allowed when the endpoint was created, and is not any more."""
    add_endpoint(receiver.url)
    end_job("ftjob-1")
    assert deliver(clock, AddressGuard()) == 1
    assert receiver.received == []
    ((error,),) = deliveries_of("attempts->0->>'error'")
    assert "STILLHOUSE_WEBHOOK_ALLOWED_HOSTS" in str(error)
    clock.advance(minutes=1)
    assert deliver(clock) == 1
    assert object_ids(receiver) == ["ftjob-1"]


def test_the_thread_delivers_by_the_clock_of_the_database_and_releases_what_it_cannot_end(
    receiver: Receiver,
    clock: Clock,
    add_endpoint: Callable[..., str],
    end_job: Callable[[str], str],
    settings_env: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings_env(webhook_allowed_hosts="localhost")
    monkeypatch.setattr("app.services.webhooks.deliverer.STOP_SECONDS", 0.0)
    with open_receiver(is_up=False) as silent:
        silent.server_activate()  # connections are accepted, and nothing is answered
        add_endpoint(receiver.url)
        add_endpoint(silent.url, "we_2")
        end_job("ftjob-1")
        thread = DelivererThread()
        thread.start()
        receiver.wait_for(1)
        thread.stop()
        assert not thread.is_alive()
        assert object_ids(receiver) == ["ftjob-1"]
        assert deliveries_of("status", "lease_token") in (
            [("succeeded", None), ("pending", None)],
            [("pending", None), ("pending", None)],  # released before the result was recorded
        )
        silent.listen()
        assert deliver(clock) >= 1  # without waiting for the end of a lease
        assert "ftjob-1" in object_ids(silent)


def test_an_outage_of_the_database_does_not_end_the_thread(
    receiver: Receiver,
    database: str,
    add_endpoint: Callable[..., str],
    end_job: Callable[[str], str],
    settings_env: Callable[..., Settings],
) -> None:
    add_endpoint(receiver.url)
    end_job("ftjob-1")
    settings_env(
        webhook_allowed_hosts="localhost", database_url="postgresql+psycopg://x@127.0.0.1:9/none"
    )
    thread = DelivererThread()
    with structlog.testing.capture_logs() as events:
        thread.start()
        wait_for(lambda: events, 20, "the thread did not try")
    assert [event["event"] for event in events] == ["webhooks_postponed"]
    settings_env(database_url=database)
    receiver.wait_for(1)
    thread.stop()
    assert not thread.is_alive()
    assert deliveries_of("status") == [("succeeded",)]
