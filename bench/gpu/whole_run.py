"""A real run with layer fitting, a stop, a resume and an evaluation: seconds and peak memory."""

from pathlib import Path
from typing import Any

from bench.gpu.memory import MeasuredPhases
from bench.gpu.models import Json, spec_of
from bench.gpu.sizes import Sizes
from tests.worker.memory_sink import MemorySink
from worker.distill.pipeline import Outcome, distil
from worker.distill.training.devices import Device
from worker.distill.training.trainer import Stopped
from worker.protocol.run_lines import CheckpointLine, MetricsLine
from worker.protocol.run_spec import RunSpec
from worker.train import EngineSampler

NUM_STEPS = 6
STOPPED_AFTER = 3  # steps


def run_spec(
    work: Path, student_dir: Path, sizes: Sizes, *, num_steps: int = NUM_STEPS, **more: Any
) -> RunSpec:  # Any: fields of RunSpec
    """Returns the spec of a short run in which a model teaches a part of its layers."""
    block = {
        "student": {"init": "layers", "num_layers": sizes.kept_layers, "freeze_head": False},
        "hyperparameters": {
            "n_epochs": 1000,
            "max_steps": num_steps,
            "eval_steps": num_steps,
            "checkpoint_steps": num_steps,
            "batch_tokens": sizes.run_batch_tokens,
            "max_sequence_tokens": sizes.row_tokens,
        },
    }
    return spec_of(
        work,
        (student_dir, student_dir),
        num_rows=sizes.num_run_rows,
        row_tokens=sizes.row_tokens,
        block=block,
        **more,
    )


def measure_whole_run(work: Path, student_dir: Path, sizes: Sizes, device: Device) -> Json:
    """Returns seconds and peak memory by phase, of the stopped run and of the resumed one."""
    spec = run_spec(work, student_dir, sizes)
    stopped, before = MeasuredPhases(device.name), MemorySink()
    try:
        distil(
            spec,
            work / "stopped",
            before,
            EngineSampler,
            lambda: last_step(before) >= STOPPED_AFTER,
            phases=stopped,
        )
    except Stopped as stop:
        stopped_at = stop.step
    else:
        raise RuntimeError("the run did not stop")
    checkpoint = work / "stopped" / f"step-{stopped_at}"
    spec = spec.model_copy(update={"resume_dir": checkpoint})
    resumed, after = MeasuredPhases(device.name), MemorySink()
    outcome = distil(spec, work / "resumed", after, EngineSampler, lambda: False, phases=resumed)
    return {
        "num_steps": NUM_STEPS,
        "stopped_at_step": stopped_at,
        "last_step": max(line.step for line in after.lines if isinstance(line, CheckpointLine)),
        "stopped": figures(stopped),
        "resumed": figures(resumed),
        **scores(outcome),
    }


def figures(phases: MeasuredPhases) -> Json:
    """Returns seconds and peak memory of each phase."""
    return {
        name: {"seconds": round(seconds, 2), "peak_bytes": phases.peak_bytes[name]}
        for name, seconds in phases.seconds.items()
    }


def scores(outcome: Outcome) -> Json:
    """Returns the held-out KL divergence of the fitted, untrained student and of the trained one."""
    return {
        f"kl_{name}": outcome.result[name]["kl"]
        for name in ("untrained", "student")
        if name in outcome.result
    }


def last_step(sink: MemorySink) -> int:
    """Returns the last step that sent metrics."""
    return max((line.step for line in sink.lines if isinstance(line, MetricsLine)), default=0)
