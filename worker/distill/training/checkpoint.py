"""Checkpoints: folders that either are complete and verified, or do not exist.

A checkpoint is written under another name, synced to disk, and then renamed to `step-N/`. It holds:

- `model/`: the student as a Hugging Face folder, ready to be served. A LoRA student has adapters
  in it instead of weights (worker.models.adapters).
- `optimizer.safetensors`, `rng.safetensors` and `state.json`.
- `answers.jsonl`, if the teacher wrote the completions.
- `best/`, if the best student so far is an earlier one.
- `finished/`, with the students of the job's earlier student runs.
- `manifest.json`, with the SHA-256 of every other file.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app.contracts.distillation import Precision
from app.crash_points import crash_point
from worker.disk import is_disk_full
from worker.distill.decisions import Decision
from worker.distill.students.lora import lora_tensors
from worker.errors import CorruptCheckpoint, DiskFull
from worker.models.adapters import AdapterFormat, save_adapters

MANIFEST = "manifest.json"
PROJECTIONS = "projections.safetensors"  # used in the training only, not a part of the student
SPARE_BYTES = 32 * 2**20  # for tokenizer, configuration, state and file system overhead
REPLAY = "replay.jsonl"  # the replay buffer's rollouts
MOMENTS = ("exp_avg", "exp_avg_sq")


class KeptLayers(BaseModel):
    """The layers of the start model that a student keeps. None: all of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[int, ...] | None
    encoder_layers: tuple[int, ...] | None


class TrainState(BaseModel):
    """Progress of a training: everything that the next step depends on, except tensors.

    `step` counts within one student run. A job numbers the steps of all its runs consecutively, and
    this run begins at `first_step`. `finished` has the entries of the earlier runs
    (worker.distill.student_sweep). `kept_layers` has the layers of all runs of the job, and None in
    checkpoints of versions that did not store them. `defaults_version` says which automatic values
    the job uses (worker.distill.training.automatic_values). Checkpoints without it have version 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    first_step: int = 0
    step: int = 0
    epoch: int = 0
    batch: int = 0
    trained_tokens: int = 0
    trained_seconds: float = 0.0
    best_step: int | None = None
    best_score: float | None = None
    num_bad_evals: int = 0
    is_done: bool = False
    metrics: dict[str, float] = {}
    best_metrics: dict[str, float] = {}
    untrained_metrics: dict[str, float] = {}
    num_threads: int = 1
    num_processes: int = 1
    precision: Precision | None = None  # None: not recorded, as in older checkpoints
    batch_tokens: int | None = None  # likewise
    inputs_sha256: str = ""
    num_fitted_layers: int = 0  # before the first step
    replay_phi: float = 0.0
    replay_loss: float | None = None  # held-out cross-entropy at the previous evaluation
    finished: tuple[dict[str, Any], ...] = ()  # Any: open-ended JSON
    kept_layers: tuple[KeptLayers, ...] | None = None
    defaults_version: int = 1
    decisions: tuple[Decision, ...] = ()  # those that apply to all students of the job
    has_kept_rows: bool = False  # True if the row cache has rows that were kept from answers
    teacher_quality: dict[str, Any] | None = None  # entry of the result, for a quantised teacher

    @property
    def job_step(self) -> int:
        """The step's number within the job, used for checkpoints and metrics."""
        return self.first_step + self.step


@dataclass(frozen=True)
class Snapshot:
    """Contents of a checkpoint. `best_dir` is the model folder of an earlier, better student.

    `adapters` is None for a student without adapters.
    """

    state: TrainState
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    best_dir: Path | None = None
    answers_path: Path | None = None
    replay_jsonl: bytes = b""
    projections: nn.Module | None = None
    finished_dirs: tuple[Path, ...] = ()
    adapters: AdapterFormat | None = None


def save_checkpoint(out: Path, snapshot: Snapshot) -> Path:
    """Writes the checkpoint `out/step-N`. After the return it survives a power failure.

    Raises DiskFull after the partial folder has been removed. Earlier checkpoints stay.
    """
    folder = out / f"step-{snapshot.state.job_step}"
    partial = out / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    _require_room(out, snapshot)
    try:
        partial.mkdir()
        crash_point("trainer.begun")
        _write_parts(partial, snapshot)
        crash_point("trainer.written")
        _write_manifest(partial)
        crash_point("trainer.listed")
        _delete(folder)
        partial.rename(folder)
        crash_point("trainer.renamed")
        _sync(out)
        crash_point("trainer.synced")
    except Exception as e:
        shutil.rmtree(partial, ignore_errors=True)
        if is_disk_full(e):
            raise DiskFull(
                f"no disk space for a checkpoint in {out}; free some disk space, then resume the job"
            ) from e
        raise
    return folder


def load_state(folder: Path) -> TrainState:
    """Verifies all files of a checkpoint and returns its state. Raises CorruptCheckpoint."""
    verify_checkpoint(folder)
    try:
        return TrainState.model_validate_json((folder / "state.json").read_bytes())
    except ValidationError as e:
        raise CorruptCheckpoint(f"{folder.name}/state.json cannot be read: {e}") from e


def verify_checkpoint(folder: Path) -> None:
    """Compares every file of a checkpoint with its manifest. Raises CorruptCheckpoint."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        expected = {entry["path"]: entry["sha256"] for entry in files}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CorruptCheckpoint(
            f"{folder.name} has no readable manifest; resume from an older checkpoint"
        ) from e
    missing = {"state.json", "optimizer.safetensors", "model/config.json"} - expected.keys()
    if missing:
        raise CorruptCheckpoint(
            f"{folder.name} lacks {sorted(missing)}; resume from an older checkpoint"
        )
    for path, sha256 in expected.items():
        if not (folder / path).is_file() or file_sha256(folder / path) != sha256:
            raise CorruptCheckpoint(
                f"{folder.name}/{path} has changed since it was written; resume from an older checkpoint"
            )


def load_optimizer(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    model: PreTrainedModel,
    projections: nn.Module | None = None,
) -> None:
    """Restores the step and moments of AdamW, the projections, and the random state.

    Fused and capturable optimizers expect `step` on the parameter's device, others expect it on the
    CPU.
    """
    if projections is not None and (folder / PROJECTIONS).exists():
        projections.load_state_dict(load_file(folder / PROJECTIONS))
    tensors = load_file(folder / "optimizer.safetensors")
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in _trained(model, projections):
        if f"{name}.step" in tensors:
            group = groups[parameter]
            is_on_device = group["fused"] or group["capturable"]
            step = tensors[f"{name}.step"].to(
                parameter.device if is_on_device else "cpu", torch.float32
            )
            moments = {key: tensors[f"{name}.{key}"].to(parameter.device) for key in MOMENTS}
            optimizer.state[parameter] = {"step": step, **moments}
    random = load_file(folder / "rng.safetensors")
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])


def prune_checkpoints(out: Path, *, keep_newest: int, keep_step: int | None) -> None:
    """Deletes all checkpoints except the newest ones and that of `keep_step`."""
    steps = sorted(int(p.name.removeprefix("step-")) for p in out.glob("step-*"))
    for step in steps[:-keep_newest]:
        if step != keep_step:
            _delete(out / f"step-{step}")


def _delete(folder: Path) -> None:
    """Deletes a checkpoint. It disappears in one step, so no worker stores a part of it.

    A folder that cannot be deleted stays, because the run does not depend on it.
    """
    doomed = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def link_folder(source: Path, target: Path) -> Path:
    """Replaces `target` by hard links to the files of `source`, or by copies where links fail."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=_link)
    return target


def copy_model(source: Path, target: Path, dtype: torch.dtype | None) -> Path:
    """Replaces `target` by a copy of a model folder, with float32 weights rounded to `dtype`.

    If `dtype` is None, nothing is rounded, and the files are hard links.
    """
    if dtype is None:
        return link_folder(source, target)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    num_bytes = 0
    for path in sorted(source.glob("*.safetensors")):
        tensors = {
            name: tensor.to(dtype) if tensor.dtype == torch.float32 else tensor
            for name, tensor in load_file(path).items()
        }
        save_file(tensors, target / path.name, metadata={"format": "pt"})
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    _change_json(target / "config.json", dtype=str(dtype).removeprefix("torch."))
    if (index := target / "model.safetensors.index.json").exists():
        metadata = json.loads(index.read_text())["metadata"]
        _change_json(index, metadata={**metadata, "total_size": num_bytes})
    return target


def _change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2) + "\n")


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_parts(folder: Path, snapshot: Snapshot) -> None:
    _write_model(folder / "model", snapshot)
    if snapshot.projections is not None and (projections := snapshot.projections.state_dict()):
        save_file(projections, folder / PROJECTIONS)
    crash_point("trainer.halfway")
    save_file(dict(_optimizer_tensors(snapshot)), folder / "optimizer.safetensors")
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    save_file(random, folder / "rng.safetensors")
    (folder / "state.json").write_text(snapshot.state.model_dump_json(indent=1))
    if snapshot.best_dir is not None:
        link_folder(snapshot.best_dir, folder / "best")
    for number, finished_dir in enumerate(snapshot.finished_dirs):
        link_folder(finished_dir, folder / "finished" / str(number))
    if snapshot.answers_path is not None and snapshot.answers_path.exists():
        shutil.copyfile(snapshot.answers_path, folder / "answers.jsonl")
    if snapshot.replay_jsonl:
        (folder / REPLAY).write_bytes(snapshot.replay_jsonl)


def _write_model(folder: Path, snapshot: Snapshot) -> None:
    model = snapshot.model
    if snapshot.adapters is None:
        model.save_pretrained(folder)
    else:
        folder.mkdir()
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        save_adapters(folder, lora_tensors(model), snapshot.adapters)
    snapshot.tokenizer.save_pretrained(folder)


def _optimizer_tensors(snapshot: Snapshot) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in _trained(snapshot.model, snapshot.projections):
        state = snapshot.optimizer.state.get(parameter, {})
        for key, tensor in state.items():
            yield f"{name}.{key}", tensor.detach().cpu().contiguous()


def _trained(
    model: PreTrainedModel, projections: nn.Module | None
) -> Iterator[tuple[str, nn.Parameter]]:
    yield from model.named_parameters()
    if projections is not None:
        yield from projections.named_parameters(prefix="projections")


def _write_manifest(folder: Path) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = []
    for path in paths:
        _sync(path)
        name = path.relative_to(folder).as_posix()
        entries.append({"path": name, "bytes": path.stat().st_size, "sha256": file_sha256(path)})
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=1))
    _sync(folder / MANIFEST)
    for inner in [path for path in folder.rglob("*") if path.is_dir()]:
        _sync(inner)
    _sync(folder)


def _require_room(out: Path, snapshot: Snapshot) -> None:
    needed = SPARE_BYTES + len(snapshot.replay_jsonl)
    for parameter in snapshot.model.parameters():
        # of a LoRA student, exactly the adapters are trained
        is_saved = snapshot.adapters is None or parameter.requires_grad
        needed += parameter.nbytes * (is_saved + len(MOMENTS) * parameter.requires_grad)
    free = shutil.disk_usage(out).free
    if free < needed:
        raise DiskFull(
            f"a checkpoint needs {needed / 2**20:.0f} MiB, but {free / 2**20:.0f} MiB are free; free some disk space, "
            "then resume the job"
        )


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
    return target


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
