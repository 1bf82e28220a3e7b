"""Specs of run processes: fetches the inputs of a job and names the module that runs it."""

from collections.abc import Sequence
from pathlib import Path

from app.artifact_cache import ArtifactCache
from app.contracts.messages import AnyJob, DistillationJob, ImportJob, read_adapter_base
from app.settings import Settings
from worker.cuda import DeviceClaim, claim_devices
from worker.protocol.dataset_spec import DatasetSpec
from worker.protocol.import_spec import ImportSpec
from worker.protocol.run_spec import RunSpec

Spec = RunSpec | ImportSpec | DatasetSpec
MODULES: dict[type[Spec], str] = {
    RunSpec: "worker.train",
    ImportSpec: "worker.import_model",
    DatasetSpec: "worker.build_dataset",
}


def devices_for(job: AnyJob, visible: Sequence[str], settings: Settings) -> DeviceClaim:
    """Claims the devices of a run among those of its worker. Imports and data sets use none.

    Raises TooFewDevices if the worker has fewer than the job asks for.
    """
    count = 0
    if isinstance(job, DistillationJob):
        num_asked = job.distillation.hyperparameters.num_devices
        # Processes share devices if the setting has more processes than there are devices.
        count = min(settings.num_processes, len(visible)) or num_asked
    return claim_devices(visible, count, settings)


def adapter_starts(folders: Sequence[Path], copies: ArtifactCache) -> dict[Path, Path]:
    """Fetches the start model of each folder with adapters. Raises FileNotFoundError."""
    found: dict[Path, Path] = {}
    for folder in folders:
        while (base := read_adapter_base(folder)) is not None and folder not in found:
            if base.start is None:
                raise FileNotFoundError(f"{folder} does not name the start model of its adapters")
            found[folder] = copies.fetch_folder(base.start)
            folder = found[folder]
    return found


def spec_of(
    job: DistillationJob | ImportJob,
    copies: ArtifactCache,
    settings: Settings,
    *,
    resume_dir: Path | None,
) -> RunSpec | ImportSpec:
    """Fetches the inputs of the job and returns the spec of its run process.

    Raises FileNotFoundError if an input is missing and CorruptArtifact if one is damaged.
    """
    threads = settings.num_threads
    if isinstance(job, ImportJob):
        source = None
        if job.staged is not None:
            is_file = job.format in ("gguf", "archive")
            fetch = copies.fetch_file if is_file else copies.fetch_folder
            source = fetch(job.staged)
        return ImportSpec(format=job.format, source_path=source, hub=job.hub, num_threads=threads)
    validation, test = job.validation_file, job.test_file
    teacher_dir, start_dir = (copies.fetch_folder(ref) for ref in (job.teacher, job.start))
    return RunSpec(
        distillation=job.distillation,
        teacher_dir=teacher_dir,
        start_dir=start_dir,
        start=job.start,
        adapter_starts=adapter_starts((teacher_dir, start_dir), copies),
        has_teacher=job.method != "supervised",
        training_path=copies.fetch_file(job.training_file),
        validation_path=copies.fetch_file(validation) if validation else None,
        test_path=copies.fetch_file(test) if test else None,
        split_version=job.split_version,
        cache_dir=settings.work_root() / "cache",
        cache_bytes=settings.teacher_cache_bytes,
        resume_dir=resume_dir,
        seed=job.seed,
        num_threads=threads,
        num_processes=settings.num_processes,
        keep_checkpoints=settings.keep_checkpoints,
    )
