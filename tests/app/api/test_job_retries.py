"""The stock client retries a submission by itself when its answer is lost, or its request."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from sqlalchemy import text

from app.db.locks import lock_project
from app.db.session import transaction
from tests.app.api.conftest import PROJECT, Service

ROWS = [{"prompt": f"What is {n}?", "completion": "A number."} for n in range(3)]
Submit = Callable[..., str]


class LossyRelay(threading.Thread):
    """A TCP relay in front of the API that loses the next requests or answers, each with its connection."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        self.target = ("127.0.0.1", port)
        self.num_lost_requests = self.num_lost_answers = 0
        self.requests: list[bytes] = []

    def run(self) -> None:
        with contextlib.suppress(OSError):  # the listener is closed at the end
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self.relay, args=(connection,), daemon=True).start()

    def relay(self, client: socket.socket) -> None:
        with client, socket.create_connection(self.target) as api, contextlib.suppress(OSError):
            threading.Thread(target=self.pump_requests, args=(client, api), daemon=True).start()
            while chunk := api.recv(65536):
                if self.num_lost_answers:
                    self.num_lost_answers -= 1
                    break
                client.sendall(chunk)

    def pump_requests(self, client: socket.socket, api: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := client.recv(65536):
                if self.num_lost_requests:
                    self.num_lost_requests -= 1
                    break
                self.requests.append(chunk)
                api.sendall(chunk)
            api.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def relay(service: Service) -> Iterator[LossyRelay]:
    relay = LossyRelay(urlsplit(service.url).port or 0)
    relay.start()
    yield relay
    relay.listener.close()


@pytest.fixture
def retrying(service: Service, relay: LossyRelay) -> Iterator[openai.OpenAI]:
    """A client with the retries that it has by default, behind the relay."""
    with openai.OpenAI(
        base_url=relay.url, api_key=service.new_key(), max_retries=2, timeout=20
    ) as made:
        yield made


@pytest.fixture
def submit(
    retrying: openai.OpenAI,
    client: openai.OpenAI,
    upload: Callable[..., str],
    register: Callable[..., str],
) -> Submit:
    model, file_id = register(), upload(client, ROWS)

    def do_submit(**options: Any) -> str:  # Any: options of the client
        method: Any = {"type": "distillation", "distillation": {"teacher": model}}
        created = retrying.fine_tuning.jobs.create(
            model=model, training_file=file_id, method=method, **options
        )
        return created.id

    return do_submit


def ids(client: openai.OpenAI) -> list[str]:
    return [job.id for job in client.fine_tuning.jobs.list()]


def test_lost_answers_leave_one_job(
    submit: Submit, relay: LossyRelay, client: openai.OpenAI
) -> None:
    relay.num_lost_answers = 2
    job_id = submit()
    assert ids(client) == [job_id]
    assert relay.num_lost_answers == 0


def test_an_answer_that_comes_after_the_clients_timeout_leaves_one_job(
    submit: Submit, client: openai.OpenAI
) -> None:
    def hold_the_lock() -> None:
        with transaction() as session:
            lock_project(session, PROJECT)
            is_held.set()
            time.sleep(2)  # the first attempt and its retry wait meanwhile

    is_held = threading.Event()
    holder = threading.Thread(target=hold_the_lock)
    holder.start()
    is_held.wait()
    job_id = submit(timeout=1)
    holder.join()
    assert ids(client) == [job_id]


def test_a_submission_whose_request_was_lost_does_not_get_a_job_that_was_cancelled_before(
    submit: Submit, relay: LossyRelay, client: openai.OpenAI
) -> None:
    cancelled = submit()
    client.fine_tuning.jobs.cancel(cancelled)
    relay.num_lost_requests = 1
    created = submit()
    assert sorted(ids(client)) == sorted([cancelled, created])
    assert client.fine_tuning.jobs.retrieve(created).status == "queued"
    assert relay.num_lost_requests == 0


def test_a_request_that_arrives_after_its_client_has_left_creates_no_job(
    submit: Submit, client: openai.OpenAI, relay: LossyRelay, service: Service
) -> None:
    created = submit()
    # Otherwise the API may read the request before the connection is closed, and creates its job.
    with service.blocked(), socket.create_connection(relay.target) as late:
        late.sendall(b"".join(relay.requests))
    time.sleep(0.5)
    assert ids(client) == [created]


@pytest.mark.parametrize(
    ("timeout", "is_repetition"),
    [
        ({}, True),  # a client without a timeout names none
        ({"x-stainless-timeout": "7200"}, True),
        ({"x-stainless-timeout": "20"}, False),
        ({"x-stainless-read-timeout": "20.5"}, False),
    ],
)
def test_a_retry_repeats_a_submission_within_the_timeout_that_the_client_names(
    timeout: dict[str, str],
    is_repetition: bool,
    service: Service,
    client: openai.OpenAI,
    upload: Callable[..., str],
    register: Callable[..., str],
) -> None:
    model = register()
    method = {"type": "distillation", "distillation": {"teacher": model}}
    body = {"model": model, "training_file": upload(client, ROWS), "method": method}
    with service.http() as http:
        first = http.post("/v1/fine_tuning/jobs", json=body).json()
        with transaction() as session:
            session.execute(
                text("UPDATE submissions SET attempted_at = now() - interval '5000 seconds'")
            )
        headers = {"x-stainless-retry-count": "1"} | timeout
        again = http.post("/v1/fine_tuning/jobs", json=body, headers=headers).json()
    assert (again["id"] == first["id"]) == is_repetition
