"""Estimates a job before it runs: tokens, steps, memory, disk and time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from app.auth import Principal
from app.contracts.batch_plan import batch_tokens_of
from app.contracts.job_memory import disk_bytes
from app.contracts.job_seconds import total
from app.contracts.planned_jobs import PlannedJob, RowCounts
from app.contracts.train_workers import TrainWorkerStatus
from app.db.estimates.job_costs import JobCost, count_waiting, kind_of, newest_costs
from app.db.session import transaction
from app.routing.train_workers import live_train_workers
from app.schemas.estimates import EstimatedSeconds, JobEstimate, QueueAhead, WorkerCounts
from app.schemas.jobs import CreateJob
from app.services import submission
from app.services.estimates.limits import GIB, Machine, advice, best_of, needed_disk
from app.services.estimates.planning import count_rows, planned_job
from app.services.estimates.speed import Speed, speed_of
from app.services.fine_tuning.supervised import refuse_unsupported
from app.services.row_lengths import ESTIMATES
from app.settings import Settings, get_settings
from app.storage import store

JOB_ID = "estimate"  # stands for the id of the job, with which the id of its model ends


@dataclass(frozen=True)
class Basis:
    """Everything that an estimate rests on. `workers` is None if Redis did not answer."""

    plan: submission.Plan
    job: PlannedJob
    rows: RowCounts
    sampled_share: float
    answer_tokens: float | None
    speed: Speed | None
    workers: Sequence[TrainWorkerStatus] | None
    num_waiting: int

    @property
    def machines(self) -> list[Machine]:
        """The machines of the workers that are alive."""
        return [Machine.of(worker) for worker in self.workers or ()]

    @property
    def num_processes(self) -> int:
        """Number of processes that would share a batch: one per device that the job asks for.

        Training on a CPU ignores this number.
        """
        has_devices = device_of(self.workers or ()) == "cuda"
        return self.job.block.hyperparameters.num_devices if has_devices else 1

    @property
    def num_kept(self) -> int:
        """Number of rows of the teacher that a CPU keeps while the teacher answers."""
        is_kept = self.plan.teacher.family == "causal" and device_of(self.workers or ()) != "cuda"
        is_read = self.job.block.objective.teacher_signal == "logits"
        return self.rows.num_unanswered if is_kept and is_read else 0

    @property
    def machine(self) -> Machine:
        """The machine for which memory is estimated: the best one of those that are alive."""
        has_bfloat16 = self.speed is not None and self.speed.has_bfloat16
        machines = self.machines or [Machine(has_bfloat16=has_bfloat16)]
        return best_of(machines, self.job, self.rows)


def estimate_job(principal: Principal, asked: CreateJob) -> JobEstimate:
    """Returns the estimate of a job that `asked` would create. Nothing is stored.

    Raises a StillhouseError if the request is invalid.
    """
    refuse_unsupported(asked)
    with transaction() as session:
        plan = submission.plan(session, principal.project_id, asked, job_id=JOB_ID)
        costs = newest_costs(session, principal.project_id)
        num_waiting = count_waiting(session)
    submission.inspect(plan, ESTIMATES)
    answer_tokens = known_answer_tokens(plan, costs)
    workers = live_train_workers()
    device = device_of(workers or ())
    counted = count_rows(plan, answer_tokens, device or "cpu")
    assert counted.counts is not None
    profiles = [worker.profile for worker in workers or () if worker.profile is not None]
    kind = kind_of(plan.spec.method, plan.spec.distillation.student.init)
    basis = Basis(
        plan=plan,
        job=planned_job(plan),
        rows=counted.counts,
        sampled_share=counted.sampled_share,
        answer_tokens=answer_tokens,
        speed=speed_of(costs, profiles, kind=kind, device=device),
        workers=workers,
        num_waiting=num_waiting,
    )
    return answer(basis, get_settings())


def device_of(workers: Sequence[TrainWorkerStatus]) -> Literal["cpu", "cuda"] | None:
    """Returns the device on which the workers train, or None if it is unknown."""
    devices = {worker.profile.device for worker in workers if worker.profile is not None}
    return max(devices, default=None)


def known_answer_tokens(plan: submission.Plan, costs: Sequence[JobCost]) -> float | None:
    """Returns the mean length of the teacher's answers in the newest job that has it, or None."""
    teacher = plan.spec.distillation.teacher
    found = [cost.answer_tokens for cost in costs if cost.teacher == teacher]
    return next((length for length in found if length), None)


def answer(basis: Basis, settings: Settings) -> JobEstimate:
    """Returns the response body."""
    job, rows, machine = basis.job, basis.rows, basis.machine
    memory = machine.needed_bytes(job, rows)
    free = store().free_bytes()
    has_disk = free is None or needed_disk(job, rows, settings) <= free
    seconds = None
    if basis.speed is not None:
        phases = basis.speed.seconds(
            job, rows, num_kept=basis.num_kept, num_processes=basis.num_processes
        )
        rounded: dict[str, float] = {name: round(value, 1) for name, value in phases.items()}
        seconds = EstimatedSeconds.model_validate({**rounded, "total": round(total(phases), 1)})
    workers = basis.workers or ()
    return JobEstimate(
        num_rows=rows.num_train,
        num_tokens=round(rows.num_epochs * rows.train_tokens) * job.num_runs,
        num_epochs=job.block.hyperparameters.n_epochs,
        num_steps=rows.num_steps * job.num_runs,
        seconds=seconds,
        peak_memory_bytes=memory,
        disk_bytes=disk_bytes(job, rows, keep_checkpoints=settings.keep_checkpoints),
        fits=has_disk and machine.is_able(job) and machine.has_room(job, rows),
        workers=WorkerCounts(
            alive=len(workers), busy=sum(worker.job_id is not None for worker in workers)
        ),
        queue=QueueAhead(jobs_before=basis.num_waiting),
        notes=list(notes(basis, has_disk=has_disk)),
    )


def notes(basis: Basis, *, has_disk: bool) -> Iterator[str]:
    """Yields sentences about what the estimate rests on, and which defaults were chosen."""
    rows, job = basis.rows, basis.job
    yield from _notes_on_models(basis)
    yield from _notes_on_rows(basis)
    yield from _notes_on_options(basis)
    if basis.speed is None:
        yield "No worker was measured yet, so there is no estimate of the time."
    else:
        yield basis.speed.note
        if basis.num_processes > 1:
            yield (
                f"The time assumes that the {basis.num_processes} devices divide the work on a batch equally. It does "
                "not include the exchange of gradients. The report at the end runs on one of them."
            )
    machine = basis.machine
    if basis.workers is None:
        yield "The workers are unknown, because Redis did not answer."
    elif not basis.workers:
        yield "No train worker is alive; the job would wait until one is."
    elif not machine.has_room(job, rows):
        yield (
            f"The largest worker has {(machine.memory_bytes or 0) / GIB:.1f} GiB of memory, which is too little; "
            f"{advice(job, rows, machine)}."
        )
    elif num_short := sum(not other.has_devices(job) for other in basis.machines):
        yield (
            f"{num_short} of the {len(basis.machines)} workers that are alive have too few CUDA devices; "
            "the job fails if it starts there."
        )
    elif num_short := sum(not other.has_precision(job) for other in basis.machines):
        yield (
            f"{num_short} of the {len(basis.machines)} workers that are alive cannot quantise the teacher to "
            f"{job.block.teacher_precision}; the job fails if it starts there."
        )
    elif num_small := sum(not other.has_room(job, rows) for other in basis.machines):
        yield (
            f"{num_small} of the {len(basis.machines)} workers that are alive have too little memory; "
            "the job may fail if it starts there."
        )
    if not has_disk:
        yield "The disk has too little free space; delete files or models, or train a smaller student."


def _notes_on_models(basis: Basis) -> Iterator[str]:
    job = basis.job
    used = {"model": job.start} | ({"teacher": job.teacher} if job.has_teacher else {})
    for name, sizes in used.items():
        if sizes.guess_reason:
            yield f"The sizes of the {name} are a guess, because {sizes.guess_reason}; import it again."


def _notes_on_rows(basis: Basis) -> Iterator[str]:
    rows = basis.rows
    if basis.plan.validation is None:
        yield f"{rows.num_valid} rows are held out for the evaluation."
    if basis.sampled_share < 1:
        yield f"The tokens of {basis.sampled_share:.0%} of the training rows were counted."
    if rows.num_unanswered and basis.job.has_teacher:
        source = "the mean of an earlier job" if basis.answer_tokens else "half of max_new_tokens"
        yield (
            f"The teacher writes the answers. They are assumed to have {rows.answer_tokens:.0f} tokens each, "
            f"{source}."
        )


def _notes_on_options(basis: Basis) -> Iterator[str]:
    job = basis.job
    h, student = job.block.hyperparameters, job.block.student
    sizes = ", ".join(
        f"{sizes.num_layers} layers and {sizes.num_parameters / 1e6:.3g} million parameters"
        for sizes in job.students
    )
    number = "student has" if len(job.students) == 1 else "students have"
    yield f"The {number} {sizes}; student.init is {student.init}."
    if h.batch_tokens == "auto" and h.batch_rows is None:
        num_tokens = batch_tokens_of(
            h,
            device=device_of(basis.workers or ()) or "cpu",
            num_tokens=basis.rows.train_tokens + basis.rows.num_train,
            num_processes=h.num_devices,
        )
        yield f"A step has at most {num_tokens} tokens."
    if job.block.teacher_precision != "auto":
        yield "The time is that of a teacher that is not quantised. A quantised one is slower on a CPU."
    if h.early_stopping is not None:
        yield "The training may stop early and take less time."
    if job.keeps_teacher:
        yield "The teacher runs in the training, which takes time that varies with the answers."
