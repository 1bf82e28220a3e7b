"""Checkpoints of LoRA students hold adapters. Those of older versions hold merged weights."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.worker.memory_sink import MemorySink
from worker.distill.training.checkpoint import MANIFEST, _write_manifest
from worker.distill.training.trainer import Stopped
from worker.models.adapters import TENSORS, merge_adapters, read_adapters
from worker.protocol.run_lines import MetricsLine
from worker.protocol.run_spec import RunSpec

MakeSpec = Callable[..., RunSpec]
Run = Callable[..., MemorySink]
LORA = {"student": {"init": "lora", "lora": {"rank": 4}}}
TEN_STEPS = {
    "n_epochs": 20,
    "max_steps": 10,
    "batch_tokens": 512,
    "eval_steps": 3,
    "checkpoint_steps": 5,
}


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def assert_same_student(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.equal(theirs[name])


def stop_at(run: Run, spec: RunSpec, step: int, out: Path) -> Path:
    """Runs a spec up to a step of the job, and returns the checkpoint."""
    sink = MemorySink()

    def should_stop() -> bool:
        steps = [line.step for line in sink.lines if isinstance(line, MetricsLine)]
        return bool(steps) and max(steps) >= step

    with pytest.raises(Stopped):
        run(spec, out=out.name, sink=sink, should_stop=should_stop)
    return max(out.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def make_old(checkpoint: Path, start_dir: Path) -> None:
    """Changes a checkpoint to what versions that stored merged weights wrote."""
    for folder in (checkpoint / "model", checkpoint / "best"):
        if folder.exists():
            adapters = read_adapters(folder)
            merged = merge_adapters(start_dir, folder, checkpoint / "merged")
            shutil.rmtree(folder)
            merged.rename(folder)
            if folder.name == "model":
                save_file(adapters, checkpoint / "adapters.safetensors")
    (checkpoint / MANIFEST).unlink()
    _write_manifest(checkpoint)


def test_an_older_checkpoint_with_merged_weights_resumes_to_the_same_bits(
    run: Run, make_spec: MakeSpec, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    spec = make_spec(LORA, **TEN_STEPS)
    run(spec, out="whole")
    checkpoint = stop_at(run, spec, 4, tmp_path / "half")
    assert (checkpoint / "best" / TENSORS).exists()
    make_old(checkpoint, tiny_llama_dir)
    run(spec.model_copy(update={"resume_dir": checkpoint}), out="rest")
    assert_same_student(tmp_path / "rest", tmp_path / "whole")


def test_no_checkpoint_of_a_job_with_a_baseline_holds_weights(
    run: Run, make_spec: MakeSpec, tmp_path: Path
) -> None:
    evaluation = {"ce_baseline": True, "metrics": ["perplexity"], "num_samples": 0}
    spec = make_spec({**LORA, "evaluation": evaluation}, **TEN_STEPS)
    run(spec, out="whole")
    checkpoint = stop_at(run, spec, 14, tmp_path / "half")
    assert (checkpoint / "finished" / "0" / TENSORS).exists()
    assert not list(checkpoint.rglob("model.safetensors"))
    run(spec.model_copy(update={"resume_dir": checkpoint}), out="rest")
    assert_same_student(tmp_path / "rest", tmp_path / "whole")
