"""Runs batches in the API processes, with lower priority than the requests of clients.

Each batch is run by one process at a time, which holds its lease. Every answer is stored in
Postgres at once, and all other state may be lost at any time. The process with the lease answers
the lines that have no stored answer, and writes the files when none is left.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Coroutine
from contextlib import suppress
from typing import Final

import orjson
import structlog
from fastapi.concurrency import run_in_threadpool

from app.db import batches
from app.db.schema.ids import new_id
from app.db.schema.tables import Batch, BatchStatus
from app.db.session import DatabaseUnavailable, PoolExhausted, transaction
from app.db.usage.records import Usage
from app.errors import QuotaExceeded, StillhouseError, envelope
from app.routing.router import RequestRouter
from app.schemas.batches import BatchRequest
from app.schemas.completions import ChatBody, CompletionBody
from app.schemas.jobs import Json
from app.services import generation
from app.services.batch.batch_input import body_of, lines_from, parse_request
from app.services.batch.batch_output import end_batch, output_line
from app.services.generation import Order, begin_answer
from app.services.limits.budgets import demand_batch_budget
from app.settings import Settings

log = structlog.get_logger(__name__)

MAX_RUNS: Final = 4  # batches that one process runs at a time; they share its `Room`
BEAT_SECONDS: Final = 1.0  # heartbeat of a run, which also notices a cancellation
BUDGET_SECONDS: Final = 1.0  # how long a run uses the budgets that it has read
RETRY_SECONDS: Final = 2.0  # before a retry, if the error names no time
POSTPONE_SECONDS: Final = 10.0  # before a batch is released after an unexpected error
FORGET_SECONDS: Final = 120.0  # load failures further apart than this are counted separately
PASSING: Final = frozenset({429, 503})  # HTTP status of errors that are retried
LOAD_FAULTS: Final = frozenset(
    {"model_load_failed", "model_too_large", "serving_option_unavailable"}
)
NO_DATABASE: Final = (DatabaseUnavailable, PoolExhausted)


class LeaseLost(Exception):
    """Another process has the lease of the batch."""


class BatchRunner:
    """Claims and runs batches in one API process.

    Only `wake` may be called from other threads than that of the event loop.
    """

    def __init__(self, request_router: RequestRouter) -> None:
        self._request_router = request_router
        self._settings = request_router.settings
        self._room = Room(request_router.settings.max_batch_sequences)
        self._has_news = asyncio.Event()
        self._runs: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._polling = self._loop.create_task(self._poll())

    async def stop(self) -> None:
        """Stops all runs and releases their leases, so that another process can continue."""
        self._polling.cancel()
        await asyncio.gather(self._polling, return_exceptions=True)
        runs = list(self._runs)
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)

    def wake(self) -> None:
        """Looks for batches now instead of at the next interval. Thread-safe."""
        self._loop.call_soon_threadsafe(self._has_news.set)

    async def _poll(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.reconcile_seconds):
                    await self._has_news.wait()
            self._has_news.clear()
            try:
                while (
                    batch := await run_in_threadpool(self._claim, len(self._runs) >= MAX_RUNS)
                ) is not None:
                    self._start(batch)
            except NO_DATABASE as fault:
                log.warning("batches_not_seen", reason=type(fault).__name__)
            except Exception:
                log.exception("batches_not_seen")  # the loop must survive any error

    def _claim(self, only_ending: bool) -> Batch | None:
        with transaction() as session:
            return batches.claim(session, self._settings.lease_seconds, only_ending=only_ending)

    def _start(self, batch: Batch) -> None:
        log.info("batch_taken", batch=batch.id, status=batch.status)
        run = self._loop.create_task(BatchRun(batch, self._request_router, self._room).run())
        self._runs.add(run)
        run.add_done_callback(self._reap)

    def _reap(self, run: asyncio.Task[None]) -> None:
        self._runs.discard(run)
        self._has_news.set()


class BatchRun:
    """Run of one batch for as long as this process holds its lease."""

    def __init__(self, batch: Batch, request_router: RequestRouter, room: "Room") -> None:
        assert batch.lease_token is not None, "it was claimed"
        self._batch = batch
        self._token = batch.lease_token
        self._request_router = request_router
        self._room = room
        self._settings: Settings = request_router.settings
        # Times of the first and the last load failure, by model.
        self._unloadable: dict[str, tuple[float, float]] = {}
        self._budget_turn = asyncio.Lock()
        self._budget_read_at = -math.inf
        self._over_budget: QuotaExceeded | None = None

    async def run(self) -> None:
        """Answers the remaining lines, then writes the files and ends the batch.

        Releases the lease if it is cancelled or fails on the way.
        """
        try:
            if self._batch.status == BatchStatus.in_progress:
                await self._while_held(self._answer_all(), BatchStatus.in_progress)
            frozen = await run_in_threadpool(self._freeze)
            ending = run_in_threadpool(end_batch, frozen, self._token, self._settings)
            await self._while_held(ending, frozen.status)
        except LeaseLost:
            log.info("batch_let_go", batch=self._batch.id)
        except asyncio.CancelledError:
            await self._give_back()
            raise
        except Exception:
            log.exception("batch_postponed", batch=self._batch.id)
            await asyncio.sleep(POSTPONE_SECONDS)
            await self._give_back()

    async def _while_held(self, work: Coroutine[object, object, object], status: str) -> None:
        """Runs `work` while renewing the lease.

        Cancels it and returns early if the batch no longer has this status. Raises LeaseLost.
        """
        task = asyncio.ensure_future(work)
        try:
            while True:
                await asyncio.wait({task}, timeout=BEAT_SECONDS)
                if task.done():
                    break
                # The lease may expire during an outage. Its token then fences off our writes.
                with suppress(*NO_DATABASE):
                    if await run_in_threadpool(self._renew) != status:
                        return
            task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _answer_all(self) -> None:
        """Answers the remaining lines, several at a time.

        Ends early if answers can no longer be recorded, because the batch or its lease has ended.
        """
        lines = PendingLines(
            self._batch.input_key, await run_in_threadpool(self._answered), self._settings
        )
        async with asyncio.TaskGroup() as group:
            for _ in range(self._settings.max_batch_sequences):
                group.create_task(self._answer_some(lines))

    async def _answer_some(self, lines: "PendingLines") -> None:
        while (line := await lines.take()) is not None:
            number, request = line
            status, body, usage = await self._outcome(request)
            response = {"status_code": status, "request_id": new_id("req_"), "body": body}
            output = await run_in_threadpool(output_line, request.custom_id, response=response)
            if not await run_in_threadpool(self._record, number, output, status != 200, usage):
                return

    async def _outcome(
        self, request: BatchRequest
    ) -> tuple[int, Json | orjson.Fragment, Usage | None]:
        """Returns the status and the body that the API route would send, and the tokens used.

        Errors with the status 429 or 503 are retried, unless a budget is used up.
        """
        num_losses = 0
        while True:
            try:
                answer, usage = await self._ask(request)
                self._unloadable.pop(request.body["model"], None)
                return 200, answer, usage
            except StillhouseError as error:
                # A request that crashes its worker would crash one worker after the other.
                num_losses += error.code == "worker_lost"
                is_hopeless = num_losses >= self._settings.max_losses or self._is_never_loaded(
                    request, error
                )
                is_hopeless |= isinstance(error, QuotaExceeded)
                if error.status not in PASSING or is_hopeless:
                    return error.status, envelope(error), None
                await asyncio.sleep(error.retry_after_seconds or RETRY_SECONDS)
            except NO_DATABASE:
                raise
            except Exception:
                log.exception("batch_request_failed", batch=self._batch.id)
                opaque = StillhouseError(
                    f"internal server error; include {self._batch.id} when you report it"
                )
                return opaque.status, envelope(opaque), None

    def _is_never_loaded(self, request: BatchRequest, error: StillhouseError) -> bool:
        """Records a load failure and returns whether retries should end.

        That is the case after `request_timeout_seconds` of failures. An outage of the store is
        temporary, but broken model files are not.
        """
        if error.code not in LOAD_FAULTS:
            return False
        now = time.monotonic()
        first, last = self._unloadable.get(request.body["model"], (now, now))
        first = now if now - last > FORGET_SECONDS else first
        self._unloadable[request.body["model"]] = first, now
        return now - first > self._settings.request_timeout_seconds

    async def _ask(self, request: BatchRequest) -> tuple[orjson.Fragment, Usage]:
        await self._demand_budget()
        body = await run_in_threadpool(body_of, request, self._batch.endpoint)
        answer, prompts = begin_answer(body)
        model = await generation.find_model(self._batch.project_id, body.model)
        answer.model = model.model_id
        # The tenant is the project, so that a batch does not use up the limits of its API key.
        order = Order(
            answer.id,
            self._batch.id,
            model,
            prompts,
            body.num_choices,
            body.sampling(),
            tenant=self._batch.project_id,
        )
        num_sequences = sequences_of(body)
        # Requests of clients go first.
        while any(worker.num_waiting for worker in self._request_router.workers):
            await asyncio.sleep(self._settings.serve_heartbeat_seconds)
        await self._room.take(num_sequences)
        try:
            reply_stream = await generation.begin(self._request_router, order)
            try:
                while replies := await reply_stream.take():
                    answer.add(replies)
            finally:
                reply_stream.close()
        finally:
            self._room.give_back(num_sequences)
        usage = Usage(model.model_id, *answer.num_tokens)
        return orjson.Fragment(b"".join(await generation.whole_json(answer))), usage

    async def _demand_budget(self) -> None:
        """Raises QuotaExceeded if a budget was used up when it was last read."""
        async with self._budget_turn:
            if time.monotonic() - self._budget_read_at >= BUDGET_SECONDS:
                self._over_budget = None
                try:
                    await run_in_threadpool(
                        demand_batch_budget, self._batch.project_id, self._batch.created_by_key_id
                    )
                except QuotaExceeded as error:
                    self._over_budget = error
                self._budget_read_at = time.monotonic()
        if self._over_budget is not None:
            raise self._over_budget.with_traceback(None)

    def _answered(self) -> set[int]:
        with transaction() as session:
            return batches.answered_lines(session, self._batch.id)

    def _record(self, number: int, output: str, is_error: bool, usage: Usage | None) -> bool:
        with transaction() as session:
            return batches.record(
                session,
                self._batch.id,
                self._token,
                line=number,
                output=output,
                is_error=is_error,
                usage=usage,
            )

    def _renew(self) -> str:
        """Renews the lease and returns the status of the batch. Raises LeaseLost."""
        with transaction() as session:
            batch = batches.renew(
                session, self._batch.id, self._token, self._settings.lease_seconds
            )
        if batch is None:
            raise LeaseLost
        return batch.status

    def _freeze(self) -> Batch:
        with transaction() as session:
            frozen = batches.begin_finalizing(session, self._batch.id, self._token)
        if frozen is None:
            raise LeaseLost
        return frozen

    async def _give_back(self) -> None:
        def release() -> None:
            """Releases the lease."""
            with transaction() as session:
                batches.release(session, self._batch.id, self._token)

        with suppress(*NO_DATABASE):  # the lease then expires by itself
            await run_in_threadpool(release)


class PendingLines:
    """Requests of an input file that have no answer yet, with their line numbers.

    Several coroutines may call `take` at the same time. It returns None at the end of the file.
    """

    def __init__(self, key: str, answered: set[int], settings: Settings) -> None:
        self._key = key
        self._answered = answered
        self._max_line_bytes = settings.max_line_bytes
        self._turn = asyncio.Lock()
        self._read: deque[tuple[int, bytes]] = deque()
        self._number = self._offset = 0

    async def take(self) -> tuple[int, BatchRequest] | None:
        async with self._turn:
            while not self._read:
                lines, self._offset = await run_in_threadpool(
                    lines_from, self._key, self._offset, self._max_line_bytes
                )
                if not lines:
                    return None
                numbered = enumerate(lines, self._number + 1)
                self._read.extend(
                    (number, raw) for number, raw in numbered if number not in self._answered
                )
                self._number += len(lines)
            number, raw = self._read.popleft()
        return number, await run_in_threadpool(parse_request, raw)


class Room:
    """Limits how many sequences the batches of this process generate at the same time.

    Requests are admitted in the order of their calls. A request with more sequences than the limit
    runs alone.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._num_taken = 0
        self._turn = asyncio.Lock()
        self._has_room = asyncio.Event()

    async def take(self, num_sequences: int) -> None:
        async with self._turn:
            while self._num_taken and self._num_taken + num_sequences > self._most:
                self._has_room.clear()
                await self._has_room.wait()
            self._num_taken += num_sequences

    def give_back(self, num_sequences: int) -> None:
        self._num_taken -= num_sequences
        self._has_room.set()


def sequences_of(body: ChatBody | CompletionBody) -> int:
    """Returns the number of sequences that the engine generates for a body."""
    if isinstance(body, CompletionBody):
        return len(body.prompts) * max(body.num_choices, body.best_of or 1)
    return body.num_choices
