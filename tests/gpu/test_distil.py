import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.worker.memory_sink import MemorySink
from worker.distill.data.batching import collate
from worker.distill.data.rows import Example
from worker.distill.forward.hidden_states import autocast, hidden_rows
from worker.distill.pipeline import distil
from worker.distill.students.recipe import load_model
from worker.distill.training import devices
from worker.distill.training.devices import Device, Needs, Placement
from worker.distill.training.trainer import Stopped
from worker.protocol.run_lines import MessageLine, MetricsLine
from worker.protocol.run_spec import RunSpec
from worker.train import EngineSampler

pytestmark = pytest.mark.gpu
MakeSpec = Callable[..., RunSpec]


def run(spec: RunSpec, out: Path, should_stop: Callable[[], bool] = lambda: False) -> MemorySink:
    sink = MemorySink()
    distil(spec, out, sink, EngineSampler, should_stop)
    return sink


def held_out_kl(sink: MemorySink) -> list[float]:
    lines = [line for line in sink.lines if isinstance(line, MetricsLine)]
    return [line.values["valid_kl"] for line in lines if "valid_kl" in line.values]


@pytest.mark.parametrize("freeze_head", [True, False])
def test_a_student_learns_on_a_card_and_its_folder_is_float32(
    make_spec: MakeSpec, tmp_path: Path, freeze_head: bool
) -> None:
    spec = make_spec({"student": {"freeze_head": freeze_head}})
    sink = run(spec, tmp_path / "out")
    kl = held_out_kl(sink)
    assert kl[-1] < 0.5 * kl[0]
    messages = [line.message for line in sink.lines if isinstance(line, MessageLine)]
    assert any(torch.cuda.get_device_name() in message for message in messages)
    tensors = load_file(tmp_path / "out" / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_a_teacher_that_does_not_fit_beside_the_student_fills_the_cache_first(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alone(device: Device, needs: Needs) -> Placement:
        return Placement(device, "cuda", device.autocast or torch.float32, is_teacher_first=True)

    monkeypatch.setattr("worker.distill.model_pair.place", alone)
    kl = held_out_kl(run(make_spec(), tmp_path / "out"))
    assert kl[-1] < 0.5 * kl[0]


def test_a_teacher_that_does_not_fit_at_all_works_on_the_cpu(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.distill.model_pair.place", lambda device, needs: Placement(device))
    for name, cache_bytes in (("cached", 2**30), ("live", 0)):
        kl = held_out_kl(run(make_spec(cache_bytes=cache_bytes), tmp_path / name))
        assert kl[-1] < 0.5 * kl[0]


def test_the_teacher_answers_on_a_card(make_spec: MakeSpec, tmp_path: Path) -> None:
    data = {"completions": "teacher", "max_new_tokens": 8}
    assert held_out_kl(run(make_spec({"data": data}), tmp_path / "out"))


def test_a_stopped_run_goes_on_close_to_the_uninterrupted_one(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    numbers = {
        "n_epochs": 20,
        "max_steps": 10,
        "eval_steps": 5,
        "checkpoint_steps": 5,
        "batch_tokens": 512,
    }
    spec = make_spec({"hyperparameters": numbers})
    run(spec, tmp_path / "whole")
    calls = itertools.count()
    with pytest.raises(Stopped):
        run(spec, tmp_path / "first", lambda: next(calls) > 5)
    (checkpoint,) = sorted(
        (tmp_path / "first").glob("step-*"), key=lambda path: path.stat().st_mtime
    )[-1:]
    run(spec.model_copy(update={"resume_dir": checkpoint}), tmp_path / "second")
    one, other = (
        load_file(tmp_path / name / "student" / "model.safetensors") for name in ("whole", "second")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-2, atol=1e-3)


def test_a_body_under_autocast_is_close_to_float32(tiny_llama_dir: Path) -> None:
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("the card has no bfloat16")
    model = load_model(tiny_llama_dir).to("cuda")
    batch = collate([Example(tuple(range(5, 25)), ((10, 20),))], [0], "cuda")
    plain_NH = hidden_rows(model, batch).float()
    with autocast("cuda", torch.bfloat16):
        lowered_NH = hidden_rows(model, batch).float()
    assert not torch.equal(lowered_NH, plain_NH)
    cosine_N = torch.nn.functional.cosine_similarity(plain_NH, lowered_NH, dim=-1)
    assert cosine_N.min() > 0.99
    lowered_NH.sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_the_card_that_is_found_has_memory_and_a_name() -> None:
    device = devices.find_device()
    assert device.name == "cuda"
    assert device.card == torch.cuda.get_device_name()
    assert 0 < device.free_bytes <= torch.cuda.get_device_properties().total_memory


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
def test_two_cards_train_what_one_trains(make_spec: MakeSpec, tmp_path: Path) -> None:
    students = []
    for count in (1, 2):
        path = tmp_path / f"{count}.json"
        path.write_text(make_spec(num_processes=count).model_dump_json())
        out = tmp_path / f"out-{count}"
        subprocess.run(
            [sys.executable, "-m", "worker.train", str(path), "--out", str(out)],
            check=True,
            timeout=240,
        )
        students.append(load_file(out / "student" / "model.safetensors"))
    for name, tensor in students[0].items():
        torch.testing.assert_close(students[1][name], tensor, rtol=2e-2, atol=5e-3)
