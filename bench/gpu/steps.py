"""Steps of the real trainer in a real run: tokens per second, MFU, phases, waits and memory.

The run is that of `worker.distill.pipeline.distil`. A probe observes its steps, and ends it after
the last one, before a checkpoint is written.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu.memory import GIB, peak_bytes, release, reset_peak, synchronize
from bench.gpu.models import Json, spec_of
from bench.gpu.sizes import Sizes
from tests.worker.memory_sink import MemorySink
from worker.distill.model_pair import ModelPair
from worker.distill.pipeline import distil
from worker.distill.training import step_gradients, trainer
from worker.distill.training.devices import Device, Needs, Placement
from worker.distill.training.rollouts import MicroBatch
from worker.distill.training.trainer import Trainer
from worker.protocol.run_spec import RunSpec
from worker.train import EngineSampler

NUM_COUNTED = 2  # steps whose waits are counted
NUM_PHASED = 2  # steps whose phases are timed, with a wait after each phase
TOY_CARD = Device("cuda", "a pretended GPU", 80 * GIB, has_bfloat16=True)
NEVER = 10**6


class Finished(Exception):  # not an error, so its name has no such suffix
    """All steps have been measured."""


class ReadCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts reads of single values, which wait for the device."""

    num_reads = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # Any: PyTorch leaves the signature open
        """Counts one operation and runs it."""
        self.num_reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@dataclass
class StepProbe:
    """Figures of a run's steps: first to warm up, then timed, then counted, then with phases."""

    device: str
    num_warm: int
    num_timed: int
    seconds: float = 0.0
    num_tokens: int = 0
    num_targets: int = 0
    num_waits: int = 0
    peak_bytes: int = 0
    has_checkpointing: bool = False
    phases: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    _num_steps: int = 0
    _begun: float = 0.0
    _stack: list[str] = field(default_factory=list)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Observes the steps of any trainer within the block, which ends with the last one."""
        whole = Trainer._step
        with ExitStack() as stack:

            def step(of: Trainer, pieces: list[MicroBatch]) -> None:
                """Runs one step and decides what is measured next."""
                self._observe(of, pieces, whole)

            stack.enter_context(patch.object(Trainer, "_step", step))
            for place, attribute, name in (
                (Trainer, "_next_pieces", "batch"),
                (MicroBatch, "teacher_rows", "teacher"),
                (step_gradients, "hidden_rows_alone", "student forward"),
                (step_gradients, "teacher_loss", "loss"),
                (Tensor, "backward", "backward"),
                (trainer, "clipped_step", "optimizer"),
            ):
                timed = self._timed(getattr(place, attribute), name)
                stack.enter_context(patch.object(place, attribute, timed))
            try:
                yield
            except Finished:
                return
        raise RuntimeError("the run ended before all steps were measured")

    def _observe(self, of: Trainer, pieces: list[MicroBatch], whole: Callable[..., None]) -> None:
        first_counted = self.num_warm + self.num_timed
        self.has_checkpointing = of.setup.placement.has_checkpointing
        before = of.state.trained_tokens
        if self._num_steps == 0:  # the first epoch needs the teacher, also with a row cache
            reset_peak(self.device)
        is_counted = first_counted <= self._num_steps < first_counted + NUM_COUNTED
        if is_counted:
            with self._counting():
                whole(of, pieces)
        else:
            whole(of, pieces)
        if self.num_warm <= self._num_steps < first_counted:
            self.num_tokens += of.state.trained_tokens - before
            self.num_targets += sum(piece.batch.num_targets for piece in pieces)
        self._num_steps += 1
        if self._num_steps == self.num_warm:
            synchronize(self.device)
            self._begun = time.perf_counter()
        elif self._num_steps == first_counted:
            synchronize(self.device)
            self.seconds = time.perf_counter() - self._begun
            self.peak_bytes = peak_bytes(self.device)
        elif self._num_steps == first_counted + NUM_COUNTED + NUM_PHASED:
            raise Finished

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Counts the waits of the host: those that PyTorch reports, or reads on a CPU."""
        if self.device != "cuda":
            with ReadCounter() as counter:  # type: ignore[no-untyped-call]
                yield
            self.num_waits += counter.num_reads
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
        self.num_waits += sum("synchroniz" in str(warning.message) for warning in caught)

    def _timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Returns the function with its time added to a phase in the last steps."""

        def run(*args: Any, **options: Any) -> Any:  # Any: any function
            """Runs the function between two waits for the GPU."""
            if self._num_steps < self.num_warm + self.num_timed + NUM_COUNTED:
                return function(*args, **options)
            synchronize(self.device)
            begun = time.perf_counter()
            result = function(*args, **options)
            synchronize(self.device)
            seconds = time.perf_counter() - begun
            self.phases[name] = self.phases.get(name, 0.0) + seconds / NUM_PHASED
            return result

        return run


def measure_steps(
    work: Path, folders: tuple[Path, Path], sizes: Sizes, device: Device, peak_tflops: float
) -> list[Json]:
    """Returns the figures of steps with a live teacher, and from the row cache."""
    entries = []
    for batch_tokens in sizes.batch_tokens:
        for teacher in ("live", "cached"):
            entries.append(
                measure_run(
                    work / f"{teacher}-{batch_tokens}",
                    folders,
                    sizes,
                    device,
                    peak_tflops,
                    batch_tokens=batch_tokens,
                    is_cached=teacher == "cached",
                )
            )
    return entries


def measure_run(
    work: Path,
    folders: tuple[Path, Path],
    sizes: Sizes,
    device: Device,
    peak_tflops: float,
    *,
    batch_tokens: int,
    is_cached: bool,
) -> Json:
    """Returns the figures of one kind of step."""
    # the first epoch fills the cache, so that all measured steps read from it
    num_batches = sizes.num_warm if is_cached else sizes.num_warm + sizes.num_timed
    spec = spec_of(
        work,
        folders,
        num_rows=num_batches * (batch_tokens // sizes.row_tokens),
        row_tokens=sizes.row_tokens,
        block={
            "student": {"init": "checkpoint", "freeze_head": False},
            "hyperparameters": {
                "n_epochs": 100,
                "batch_tokens": batch_tokens,
                "max_sequence_tokens": sizes.row_tokens,
                "eval_steps": NEVER,
                "checkpoint_steps": NEVER,
            },
        },
        **({} if is_cached else {"cache_bytes": 0}),
    )
    probe = StepProbe(device.name, num_warm=sizes.num_warm, num_timed=sizes.num_timed)
    sink = MemorySink()
    with probe.attached():
        distil(spec, work / "out", sink, EngineSampler, lambda: False)
    release(device.name)  # the next run measures the free memory before it places its models
    needs, placement = estimated(spec, device)
    tokens_per_second = probe.num_tokens / probe.seconds
    flop = flop_per_token(sizes, probe, is_cached=is_cached)
    return {
        "teacher": "cached" if is_cached else "live",
        "batch_tokens": batch_tokens,
        "tokens_per_second": round(tokens_per_second),
        "ms_per_step": round(1000 * probe.seconds / probe.num_timed, 2),
        "mfu": round(tokens_per_second * flop / (1e12 * peak_tflops), 4),
        "phase_ms": {name: round(1000 * s, 2) for name, s in probe.phases.items()},
        "waits_per_step": probe.num_waits / NUM_COUNTED,
        "has_checkpointing": probe.has_checkpointing,
        "peak_bytes": probe.peak_bytes,
        "estimated_bytes": estimated_bytes(needs, placement),
    }


def flop_per_token(sizes: Sizes, probe: StepProbe, *, is_cached: bool) -> float:
    """Returns the operations per token that a step needs, without attention and recomputation.

    They are 6 per parameter of the student and 2 per parameter of the teacher. The LM heads
    multiply targets only.
    """
    targets_per_token = probe.num_targets / probe.num_tokens
    body = 6 * sizes.student.layer_parameters + 2 * sizes.teacher.layer_parameters * (not is_cached)
    heads = sizes.vocab_size * (6 * sizes.student.hidden_size + 2 * sizes.teacher.hidden_size)
    return body + targets_per_token * heads


def estimated(spec: RunSpec, device: Device) -> tuple[Needs, Placement]:
    """Returns the estimate of memory for a run of this spec, and the placement that follows."""
    card = device if device.name == "cuda" else TOY_CARD
    pair = ModelPair(spec, card.name, card=card)
    return pair.needs(pair.micro_tokens, can_cache=True), pair.placement


def estimated_bytes(needs: Needs, placement: Placement) -> int:
    """Returns the estimated memory of a step: of the student, and of a teacher beside it."""
    if placement.teacher_device == "cuda" and not placement.is_teacher_first:
        return needs.both_bytes(
            placement.teacher_dtype, has_checkpointing=placement.has_checkpointing
        )
    return needs.student_bytes - needs.saved_bytes * placement.has_checkpointing
