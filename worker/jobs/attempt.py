"""One attempt at a job: starts the run process and records what it reports.

The run process has no access to the queue or the database. This module makes all writes, each
with the lease token. An attempt that has lost its lease kills its process and writes nothing.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

import structlog

from app.artifact_cache import ArtifactCache
from app.contracts.datasets import DatasetJob
from app.contracts.messages import AnyJob, ArtifactRef, DistillationJob, JobFailure, ModelFacts
from app.crash_points import crash_point
from app.settings import Settings
from app.storage import CorruptArtifact, StorageError, store
from worker.core_sharing import shared_cores
from worker.cuda import NO_DEVICES, visible_devices
from worker.disk import is_disk_full
from worker.errors import CorruptCheckpoint, DiskFull, TooFewDevices
from worker.jobs import dataset_job, lease_client, run_specs
from worker.jobs.lease_client import CheckpointRef, Lease, LeaseLost
from worker.jobs.lease_heartbeat import DATABASE_AWAY, LeaseHeartbeat
from worker.jobs.model_cards import write_card
from worker.jobs.result_files import FileColumns, upload_results
from worker.jobs.run_process import RunProcess, child_environment
from worker.jobs.run_specs import Spec
from worker.protocol.dataset_spec import DatasetSpec
from worker.protocol.run_lines import (
    CheckpointLine,
    DatasetLine,
    ErrorLine,
    MessageLine,
    ResultLine,
    RunLine,
    StoppedLine,
)

log = structlog.get_logger(__name__)

POLL_SECONDS = 0.2
RECORD_SECONDS = 1.0  # lines are collected for this long and then written in one transaction
GRACE_SECONDS = 60.0  # time for a run that is told to stop to write its checkpoint
SILENCE_SECONDS = 3600.0  # a run that writes no line for longer is taken to hang
DATABASE_RETRY_SECONDS = 1.0

# Outcomes of a run, after which it writes nothing more.
OUTCOMES = ResultLine | DatasetLine | ErrorLine | StoppedLine
# Advice to the owner of a job whose disk was full, by kind of job.
ADVICE = {
    "distillation": "resume the job",
    "import": "import the model again",
    "dataset": "create the data set again",
}
P = ParamSpec("P")
R = TypeVar("R")


class Attempt:
    """One run of a leased job, from fetching its inputs to recording its outcome."""

    def __init__(
        self,
        lease: Lease,
        lease_heartbeat: LeaseHeartbeat,
        should_drain: Callable[[], bool],
        settings: Settings,
    ) -> None:
        self.lease = lease
        self.lease_heartbeat = lease_heartbeat
        self.should_drain = should_drain
        self.settings = settings
        self.folder = settings.work_root() / lease.job_id / str(lease.token)
        self.out = self.folder / "out"
        # The run process reads these copies in place. Their locks are held by this process, and
        # the run process dies with it, so no copy is deleted while a run reads it.
        self.copies = ArtifactCache(
            store(), settings.work_root() / "fetched", settings.artifact_cache_bytes
        )
        self.process: RunProcess | None = None
        self.devices = NO_DEVICES
        self.resumed: CheckpointRef | None = None
        self.stop_deadline: float | None = None
        self.is_done = False
        self._gathered: list[RunLine] = []
        self._num_records = 0
        self._recorded_at = 0.0

    def run(self) -> None:
        # Folders with older tokens are of killed workers, whose leases are over. A folder with a
        # newer token belongs to another worker, which means that this lease is over.
        for stale in self.folder.parent.glob("*"):
            if not stale.name.isdecimal() or int(stale.name) <= self.lease.token:
                shutil.rmtree(stale, ignore_errors=True)
        resume_dir = self._good_checkpoint()
        try:
            self.devices = run_specs.devices_for(self.lease.spec, visible_devices(), self.settings)
            spec = self._spec(self.lease.spec, resume_dir)
        except TooFewDevices as error:
            self._end_with_error(JobFailure(code=error.code, message=str(error)))
            return
        except (FileNotFoundError, CorruptArtifact) as error:
            log.warning("inputs_missing", job=self.lease.job_id, error=str(error))
            message = "an input of the job is damaged or no longer in the store; upload it again and submit a new job"
            self._write(
                lease_client.fail, self.lease, JobFailure(code="input_missing", message=message)
            )
            return
        arguments = self._prepare_inputs(spec)
        crash_point("inputs.prepared")
        environment = child_environment(self.lease.spec, self.settings, self.devices)
        self.process = process = RunProcess(
            arguments, self.folder, environment, shared_cores=shared_cores(self.settings)
        )
        while not self.is_done:
            self._require_lease()
            self._forward_signals(process)
            self._take(process.take_lines(POLL_SECONDS))
            if process.is_over and not self.is_done:
                self._record_gathered()
                self._end_without_verdict(process)

    def give_up(self, fault: Exception) -> None:
        """Records a loss after an error of the worker, or pauses the job if the disk is full.

        If the database cannot be reached, nothing is recorded and the lease expires.
        """
        try:
            self._kill()
            if is_disk_full(fault):
                self._end_without_disk("the worker's disk is full")
            else:
                lease_client.lost(self.lease, "The worker could not run the job.")
        except (LeaseLost, *DATABASE_AWAY) as error:
            log.warning("give_up_failed", job=self.lease.job_id, error=type(error).__name__)

    def clean_up(self) -> None:
        self._kill()
        self.devices.close()
        self.copies.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _spec(self, job: AnyJob, resume_dir: Path | None) -> Spec:
        """Fetches the inputs and returns the spec. Raises FileNotFoundError or CorruptArtifact."""
        if isinstance(job, DatasetJob):
            records = dataset_job.export_records(self.lease, job, self.folder, self._write)
            return DatasetSpec(
                records_path=records, options=job.options, max_row_bytes=job.max_row_bytes
            )
        return run_specs.spec_of(job, self.copies, self.settings, resume_dir=resume_dir)

    def _prepare_inputs(self, spec: Spec) -> list[str]:
        """Writes the spec to the work folder; returns the module and arguments of the process."""
        self.folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        spec_path = self.folder / "spec.json"
        spec_path.write_text(spec.model_dump_json())
        return [run_specs.MODULES[type(spec)], str(spec_path), "--out", str(self.out)]

    def _good_checkpoint(self) -> Path | None:
        """Returns a copy of the newest checkpoint whose checksums match, or None if there is none.

        Damaged checkpoints are marked as corrupt and skipped.
        """
        resume = self.lease.resume
        while resume is not None:
            if store().verify_folder(resume.store_key, resume.manifest_sha256):
                message = f"The run resumes from the checkpoint at step {resume.step}."
                self._gathered.append(MessageLine(message=message, data={"step": resume.step}))
                self.resumed = resume
                return self.copies.fetch_folder(resume.artifact)
            log.warning("checkpoint_corrupt", job=self.lease.job_id, key=resume.store_key)
            resume = self._write(lease_client.mark_corrupt, self.lease, resume.id)
        return None

    def _require_lease(self) -> None:
        if self.lease_heartbeat.is_lost:
            raise LeaseLost(self.lease.job_id)

    def _write(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Makes a call to `lease_client`, and repeats it while the database is unavailable.

        Raises LeaseLost if the call raises it, or if the heartbeat reports the lease as lost.
        """
        while True:
            self._require_lease()
            try:
                return call(*args, **kwargs)
            except DATABASE_AWAY as error:
                log.warning("database_away", job=self.lease.job_id, error=type(error).__name__)
                time.sleep(DATABASE_RETRY_SECONDS)

    def _forward_signals(self, process: RunProcess) -> None:
        if self.lease_heartbeat.orders.cancel:
            process.kill()
            self._write(lease_client.cancelled, self.lease)
            self.is_done = True
        elif self.stop_deadline is not None:
            if time.monotonic() > self.stop_deadline:
                self._kill()
        elif self.lease_heartbeat.orders.pause or self.should_drain():
            log.info("stopping_run", job=self.lease.job_id, pause=self.lease_heartbeat.orders.pause)
            process.ask_to_stop()
            self.stop_deadline = time.monotonic() + GRACE_SECONDS
        elif process.silent_seconds > SILENCE_SECONDS:
            process.kill()
            self._write(
                lease_client.lost, self.lease, "The run hung: it reported no progress for too long."
            )
            self.is_done = True

    def _take(self, lines: Sequence[RunLine]) -> None:
        for line in lines:
            if isinstance(line, CheckpointLine | OUTCOMES):
                self._record_gathered()
                if isinstance(line, CheckpointLine):
                    self._commit(line)
                else:
                    self._end(line)
                if self.is_done:
                    return
            else:
                self._gathered.append(line)
        if time.monotonic() - self._recorded_at > RECORD_SECONDS:
            self._record_gathered()

    def _record_gathered(self) -> None:
        if self._gathered:
            self._num_records += 1
            self._write(lease_client.record, self.lease, self._num_records, self._gathered)
            self._gathered = []
        self._recorded_at = time.monotonic()

    def _commit(self, line: CheckpointLine) -> None:
        """Stores the checkpoint and then records it in the database.

        The checkpoint counts only once its row is committed.
        """
        key = f"checkpoints/{self.lease.job_id}/{self.lease.token}/step-{line.step}"
        try:
            ref = store().put_folder(self.out / line.folder, key, link=True)
        except (OSError, StorageError) as error:
            log.warning(
                "checkpoint_not_stored", job=self.lease.job_id, step=line.step, error=str(error)
            )
            # If the run continued, it could lose all work after its last stored checkpoint.
            if is_disk_full(error):
                self._kill()
                self._end_without_disk(
                    f"the store has no space for the checkpoint at step {line.step}"
                )
                self.is_done = True
                return
            # The run continues. A later attempt would resume from the previous checkpoint.
            reason = getattr(error, "strerror", None) or type(error).__name__
            message = f"The checkpoint at step {line.step} could not be stored ({reason})."
            self._gathered.append(
                MessageLine(level="warn", message=message, data={"step": line.step})
            )
            return
        crash_point("checkpoint.stored")
        freed = self._write(
            lease_client.commit_checkpoint, self.lease, line.step, ref, line.metrics, line.is_best
        )
        crash_point("checkpoint.committed")
        _delete(freed)

    def _end(self, line: ResultLine | DatasetLine | ErrorLine | StoppedLine) -> None:
        if isinstance(line, ResultLine):
            self._finish(line)
        elif isinstance(line, DatasetLine):
            self._finish_dataset(line)
        elif isinstance(line, ErrorLine) and line.code == CorruptCheckpoint.code and self.resumed:
            self._write(lease_client.mark_corrupt, self.lease, self.resumed.id)
            self._write(lease_client.lost, self.lease, "The checkpoint could not be loaded.")
        elif isinstance(line, ErrorLine):
            self._end_with_error(JobFailure(code=line.code, message=line.message, param=line.param))
        else:
            self._end_stopped()
        self.is_done = True

    def _finish(self, line: ResultLine) -> None:
        # The key contains the lease token, so a stale worker cannot overwrite the model that the
        # next attempt stores.
        key = f"models/{self.lease.job_id}/{self.lease.token}"
        self._add_card(line)
        try:
            ref = store().put_folder(self.out / line.folder, key, link=True)
            files = self._upload_results(line)
        except (OSError, StorageError) as error:
            log.warning("model_not_stored", job=self.lease.job_id, error=str(error))
            if is_disk_full(error):
                self._end_without_disk("the store has no space for the model")
            else:
                self._write(lease_client.lost, self.lease, "The model could not be stored.")
            return
        crash_point("model.stored")
        is_registered = self._write(self._register, ref, line, files)
        crash_point("model.registered")
        if not is_registered:
            _delete([key, *(file["store_key"] for file in files)])

    def _add_card(self, line: ResultLine) -> None:
        origin = self._write(lease_client.origin, self.lease)
        try:
            write_card(self.out / line.folder, self.lease, origin, line)
        except Exception:  # a model is kept even if its card cannot be written
            log.exception("card_not_written", job=self.lease.job_id)

    def _finish_dataset(self, line: DatasetLine) -> None:
        assert isinstance(self.lease.spec, DatasetJob)
        try:
            files = dataset_job.store_files(self.out, line, self.lease.spec.name)
        except (OSError, StorageError) as error:
            log.warning("data_set_not_stored", job=self.lease.job_id, error=str(error))
            if is_disk_full(error):
                self._end_without_disk("the store has no space for the data set")
            else:
                self._write(lease_client.lost, self.lease, "The data set could not be stored.")
            return
        crash_point("dataset.stored")
        if not self._write(dataset_job.finish, self.lease, files, line.report):
            _delete(file.columns["store_key"] for file in files)

    def _end_without_disk(self, reason: str) -> None:
        advice = ADVICE[self.lease.spec.kind]
        message = f"{reason}; free some disk space, then {advice}"
        self._end_with_error(JobFailure(code=DiskFull.code, message=message))

    def _end_with_error(self, failure: JobFailure) -> None:
        if failure.code == DiskFull.code and isinstance(self.lease.spec, DistillationJob):
            # Pause instead of fail: a failed job would lose its checkpoints.
            self._write(
                lease_client.pause_for_disk, self.lease, f"The job is paused: {failure.message}"
            )
        else:
            self._write(lease_client.fail, self.lease, failure)

    def _upload_results(self, line: ResultLine) -> list[FileColumns]:
        if not isinstance(self.lease.spec, DistillationJob) or self.lease.project_id is None:
            return []
        return upload_results(
            self.out, line.files, self._write(lease_client.metric_series, self.lease)
        )

    def _register(self, ref: ArtifactRef, line: ResultLine, files: list[FileColumns]) -> bool:
        assert not isinstance(self.lease.spec, DatasetJob)
        return lease_client.finish(
            self.lease,
            model_id=self.lease.spec.output_model,
            ref=ref,
            facts=ModelFacts.model_validate(line.facts),
            result=line.result,
            trained_tokens=line.trained_tokens,
            files=files,
        )

    def _end_stopped(self) -> None:
        """Records a run that has stopped: for a pause, for a drain, or by a foreign signal."""
        if self.stop_deadline is None:
            self._write(lease_client.lost, self.lease, "The run was stopped by an external signal.")
        elif self.lease_heartbeat.orders.pause:
            self._write(lease_client.paused, self.lease)
        else:
            self._write(lease_client.release, self.lease, "The worker was shut down.")

    def _end_without_verdict(self, process: RunProcess) -> None:
        if self.stop_deadline is not None:
            self._end_stopped()
        else:
            reason, code = process.describe_death()
            if code == DiskFull.code:
                self._end_without_disk("the worker's disk is full")
            else:
                self._write(lease_client.lost, self.lease, reason, code)
        self.is_done = True

    def _kill(self) -> None:
        if self.process is not None:
            self.process.kill()


def _delete(keys: Iterable[str]) -> None:
    """Deletes keys from the store and logs errors.

    The garbage collector deletes what remains: its row is `deleting`, or no row refers to it.
    """
    for key in keys:
        try:
            store().delete(key)
        except Exception:
            log.exception("not_deleted", key=key)  # an error of the store must not end the run
