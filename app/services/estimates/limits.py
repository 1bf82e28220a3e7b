"""Refuses jobs that cannot fit into the memory or on the disk, and says what would fit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from app.contracts.distillation import Auto, Distillation, Student, TeacherPrecision
from app.contracts.job_memory import (
    cpu_bytes,
    device_bytes,
    disk_bytes,
    least_device_bytes,
    mapped_bytes,
)
from app.contracts.planned_jobs import PlannedJob, RowCounts
from app.contracts.train_workers import TrainWorkerStatus, precision_needs
from app.errors import BadRequest
from app.routing.train_workers import live_train_workers
from app.services import submission
from app.services.estimates.planning import least_counts, planned_job
from app.services.fine_tuning.student_rules import refuse
from app.settings import Settings
from app.storage import store

GIB = 2**30
# A job is refused if the least memory that it needs is more than that of a machine, times this
# factor. Estimates for CPUs were compared with jobs (bench/LOG.md), those for GPUs were not.
CPU_MARGIN = 1.2
DEVICE_MARGIN = 1.5
LEAST_BATCH_TOKENS = 64


@dataclass(frozen=True)
class Machine:
    """Properties of a worker's machine that decide which jobs fit.

    memory_bytes: That of the GPU if there is one. None if it is unknown, as before the machine is
        measured: it may have a GPU.
    num_devices: Most CUDA devices that a job may ask for. None: any number.
    teacher_precisions: Formats to which it can quantise a teacher. None if they are unknown.
    """

    device: str = "cpu"
    has_bfloat16: bool = False
    memory_bytes: int | None = None
    num_devices: int | None = None
    teacher_precisions: tuple[str, ...] | None = None

    @classmethod
    def of(cls, worker: TrainWorkerStatus) -> "Machine":
        profile = worker.profile
        known = cls(num_devices=worker.num_devices, teacher_precisions=worker.teacher_precisions)
        if profile is None:
            return known
        memory = worker.memory_bytes if profile.device == "cpu" else profile.memory_bytes
        return replace(
            known,
            device=profile.device,
            has_bfloat16=profile.has_bfloat16,
            memory_bytes=memory,
        )

    def has_devices(self, job: PlannedJob) -> bool:
        """Returns whether the machine has as many CUDA devices as the job asks for."""
        num_asked = job.block.hyperparameters.num_devices
        return self.num_devices is None or num_asked <= self.num_devices

    def has_precision(self, job: PlannedJob) -> bool:
        """Returns whether the machine can quantise the teacher as the job asks."""
        asked = job.block.teacher_precision
        return (
            asked == "auto" or self.teacher_precisions is None or asked in self.teacher_precisions
        )

    def is_able(self, job: PlannedJob) -> bool:
        """Returns whether the machine supports what the job asks for, apart from its memory."""
        return self.has_devices(job) and self.has_precision(job)

    def needed_bytes(self, job: PlannedJob, rows: RowCounts) -> int:
        """Returns the peak memory of a job on this machine."""
        is_exact = job.block.hyperparameters.precision == "float32"
        needed = cpu_bytes if self.device == "cpu" else device_bytes
        return needed(job, rows, has_bfloat16=self.has_bfloat16 and not is_exact)

    def has_room(self, job: PlannedJob, rows: RowCounts) -> bool:
        """Returns whether the job fits according to the estimate."""
        return self.memory_bytes is None or self.needed_bytes(job, rows) <= self.memory_bytes

    def may_have_room(self, job: PlannedJob, rows: RowCounts) -> bool:
        """Returns whether the job may fit, although the estimate may say that it does not."""
        if self.memory_bytes is None:
            return True
        margin = CPU_MARGIN if self.device == "cpu" else DEVICE_MARGIN
        return self.least_bytes(job, rows) <= margin * self.memory_bytes

    def least_bytes(self, job: PlannedJob, rows: RowCounts) -> int:
        """Returns the memory without which the job cannot run on this machine.

        On a CPU, pages of weights that are only read can be dropped.
        """
        if self.device != "cpu":
            return least_device_bytes(job, rows)
        return self.needed_bytes(job, rows) - mapped_bytes(job)


def inspect(plan: submission.Plan, settings: Settings) -> None:
    """Runs all checks of a job before it is queued, including those of memory and disk.

    They take seconds, so call this outside a transaction. Raises BadRequest or TooManyRequests.
    """
    refuse_too_large(planned_job(plan), least_counts(plan), settings)
    submission.inspect(plan)


def refuse_too_large(job: PlannedJob, rows: RowCounts, settings: Settings) -> None:
    """Raises BadRequest if the job cannot fit on the disk, or on any worker that is alive.

    `rows` are the least counts that are possible. Nothing but the disk is checked if no worker is
    alive, nor the memory if one of them was not measured yet.
    """
    needed, free = needed_disk(job, rows, settings), store().free_bytes()
    if free is not None and free < needed:
        raise BadRequest(
            f"not enough disk: the job needs about {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free; "
            f"delete files or models, or pick a smaller student",
            "insufficient_storage",
        )
    machines = [Machine.of(worker) for worker in live_train_workers() or ()]
    if not machines:
        return
    large = [machine for machine in machines if machine.has_devices(job)]
    if not large:
        most = max(machine.num_devices or 0 for machine in machines)
        raise BadRequest(
            f"too few CUDA devices: the job asks for {job.block.hyperparameters.num_devices}, and the largest worker has "
            f"{most}; lower num_devices, or start a train worker with more devices",
            "too_few_devices",
            "hyperparameters.num_devices",
        )
    able = [machine for machine in large if machine.has_precision(job)]
    if not able:
        refuse_precision(job.block.teacher_precision)
    if any(machine.may_have_room(job, rows) for machine in able):
        return
    best = best_of(able, job, rows)
    raise BadRequest(
        f"not enough memory: the job needs at least {best.least_bytes(job, rows) / GIB:.1f} GiB, and the largest worker "
        f"has {(best.memory_bytes or 0) / GIB:.1f} GiB; {advice(job, rows, best)}",
        "insufficient_memory",
    )


def refuse_precision(asked: TeacherPrecision | Auto) -> NoReturn:
    """Raises BadRequest for a precision of the teacher that no worker supports."""
    assert asked != "auto"
    refuse(
        f"no train worker can quantise a teacher to {asked}: it needs {precision_needs(asked)}; leave teacher_precision "
        "out, or start such a worker",
        "teacher_precision",
        "unsupported_precision",
    )


def needed_disk(job: PlannedJob, rows: RowCounts, settings: Settings) -> int:
    """Returns the disk space that must be free for the job, without the teacher's cache.

    The cache is optional: a run works without it if the disk has no room.
    """
    bare = replace(rows, train_targets=0, valid_targets=0)
    needed = disk_bytes(job, bare, keep_checkpoints=settings.keep_checkpoints)
    return needed + settings.min_free_bytes


def best_of(machines: Sequence[Machine], job: PlannedJob, rows: RowCounts) -> Machine:
    """Returns a machine on which the job fits, or else the one that lacks the least memory.

    One with enough CUDA devices, and with the precision of the teacher, comes before others. Then
    comes one with a GPU, and then one that was measured.
    """

    def rank(machine: Machine) -> tuple[bool, bool, bool, float]:
        """Returns whether the job fits, whether there is a GPU, and the share of memory there is."""
        share = (machine.memory_bytes or 0) / machine.needed_bytes(job, rows)
        return machine.is_able(job), machine.has_room(job, rows), machine.device != "cpu", share

    return max(machines, key=rank)


def advice(job: PlannedJob, rows: RowCounts, machine: Machine) -> str:
    """Returns what would fit on the machine, as the end of a sentence."""
    found = [
        words
        for words, block in smaller_jobs(job)
        if machine.has_room(replace(job, block=block), rows)
    ]
    if not found:
        return "no smaller batch or student fits either: use a smaller model or a worker with more memory"
    return f"this may fit: {', or '.join(found)}"


def smaller_jobs(job: PlannedJob) -> Iterator[tuple[str, Distillation]]:
    """Yields changes of the options that need less memory, with the changed options.

    Of each kind, the caller takes those that fit. A kind is yielded from large to small.
    """
    block = job.block
    if job.has_teacher and job.batch_tokens > LEAST_BATCH_TOKENS:
        small = block.hyperparameters.model_copy(update={"batch_tokens": LEAST_BATCH_TOKENS})
        words = f"hyperparameters.batch_tokens = {LEAST_BATCH_TOKENS}"
        yield words, block.model_copy(update={"hyperparameters": small})
    for words, student in smaller_students(job):
        yield words, block.model_copy(update={"student": student})


def smaller_students(job: PlannedJob) -> Iterator[tuple[str, Student]]:
    """Yields smaller students: half and a quarter of the layers, and adapters."""
    student, num_layers = job.block.student, job.students[-1].stacks[-1].num_layers
    if student.init == "layers":
        for number in (num_layers // 2, num_layers // 4):
            if number > 0:
                change = {"num_layers": number, "layers": None, "num_decoder_layers": None}
                yield f"student.num_layers = {number}", student.model_copy(update=change)
    if student.init == "checkpoint":
        words = 'student.init = "lora"' if job.has_teacher else 'supervised.lora = {"rank": 16}'
        yield words, student.model_copy(update={"init": "lora", "freeze_head": True})
