import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.worker.memory_sink import MemorySink
from worker.distill.data.batching import collate
from worker.distill.data.rows import Example
from worker.distill.data_parallel import ALONE
from worker.distill.losses.divergences import TokenObjective
from worker.distill.losses.lm_head import head_of
from worker.distill.model_pair import ModelPair
from worker.distill.students.recipe import load_model
from worker.distill.teachers.cached_teacher import CachedTeacher, LiveTeacher, Teacher
from worker.distill.training import step_gradients
from worker.distill.training.devices import Placement
from worker.distill.training.rollouts import MicroBatch
from worker.distill.training.step_gradients import Gradients, StepStats, clipped_step
from worker.protocol.run_spec import RunSpec

ROWS = [Example(tuple(range(5, 25)), ((10, 20),)), Example(tuple(range(30, 42)), ((4, 12),))]


def gradients_of(
    folder: Path, batches: list[list[int]], autocast: torch.dtype | None = None
) -> tuple[StepStats, dict[str, torch.Tensor]]:
    model, teacher = load_model(folder), load_model(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    head = head_of(model)
    live = CachedTeacher(lambda: LiveTeacher(teacher), head_of(teacher), ROWS, None, None)
    gradients = Gradients(model, head, live, None, autocast, ALONE)
    pieces = [MicroBatch(collate(ROWS, indices)) for indices in batches]
    sums = gradients.add(pieces, TokenObjective(), list(model.parameters()))
    return sums, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_pieces_add_up_to_the_gradient_of_one(tiny_llama_dir: Path) -> None:
    one, whole = gradients_of(tiny_llama_dir, [[0, 1]])
    two, parts = gradients_of(tiny_llama_dir, [[0], [1]])
    assert (two.num_targets, two.num_tokens) == (one.num_targets, one.num_tokens) == (18, 30)
    assert two.read()[0] == pytest.approx(one.read()[0], rel=1e-5)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)


def test_under_autocast_losses_are_close_and_gradients_float32(tiny_llama_dir: Path) -> None:
    plain, whole = gradients_of(tiny_llama_dir, [[0, 1]])
    lowered, gradients = gradients_of(tiny_llama_dir, [[0, 1]], torch.bfloat16)
    assert float(lowered.sums[0]) != float(plain.sums[0])
    assert float(lowered.sums[0]) == pytest.approx(float(plain.sums[0]), rel=0.1)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    one, other = (torch.cat([g.flatten() for g in found.values()]) for found in (whole, gradients))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.98


def put_teacher(monkeypatch: pytest.MonkeyPatch, placement: Placement) -> None:
    monkeypatch.setattr(ModelPair, "_place", lambda self, *, can_cache: placement)


def test_a_teacher_that_works_before_the_student_comes_teaches_the_same_bits(
    run: Callable[..., MemorySink],
    make_spec: Callable[..., RunSpec],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = {"student": {"freeze_head": False}}
    run(make_spec(block), out="beside")
    put_teacher(monkeypatch, Placement(is_teacher_first=True))
    loads: list[ModelPair] = []
    live_teacher = ModelPair.live_teacher

    def count(self: ModelPair, prefix: tuple[int, ...] = ()) -> Teacher:
        loads.append(self)
        return live_teacher(self, prefix)

    monkeypatch.setattr(ModelPair, "live_teacher", count)
    run(make_spec(block, spec={"cache_dir": tmp_path / "fresh"}), out="first")
    assert len(loads) == 1  # and never again
    one, other = (
        load_file(tmp_path / out / "student" / "model.safetensors") for out in ("beside", "first")
    )
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_teacher_in_bfloat16_teaches_a_float32_student(
    run: Callable[..., MemorySink],
    make_spec: Callable[..., RunSpec],
    series: Callable[[MemorySink, str], list[float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = {"student": {"freeze_head": False}}
    run(make_spec(block, spec={"cache_dir": tmp_path / "plain"}, max_steps=1), out="plain-out")
    put_teacher(monkeypatch, Placement(teacher_dtype=torch.bfloat16))
    kl = series(run(make_spec(block, n_epochs=6)), "valid_kl")
    assert kl[-1] < 0.5 * kl[0]
    tensors = load_file(tmp_path / "out" / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    (lowered,) = (tmp_path / "cache").glob("teacher/*/rows.bin")
    (plain,) = (tmp_path / "plain").glob("teacher/*/rows.bin")
    assert 2 * lowered.stat().st_size == plain.stat().st_size


@pytest.mark.parametrize("norm", [0.5, 3.0, float("nan")])
def test_clipping_on_a_device_is_that_of_a_cpu(
    norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values that are not read give the same step. The fused kernel of a CPU has the same inputs."""
    stats = StepStats.of(1, 1, ("loss_sum",), torch.ones(1).double(), torch.tensor(norm).double())
    steps = []
    for reads in (True, False):
        parameter = torch.nn.Parameter(torch.ones(3))
        parameter.grad = torch.tensor([0.1, -0.2, 0.3])
        optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
        monkeypatch.setattr(step_gradients, "is_known", lambda tensor, reads=reads: reads)
        clipped_step(optimizer, stats, 1.0)
        state = optimizer.state.get(parameter, {"step": torch.tensor(0.0)})
        steps.append([*parameter.detach().tolist(), float(state["step"])])
    assert steps[0] == steps[1]
    assert (steps[0] == [1.0, 1.0, 1.0, 0.0]) == math.isnan(norm)
