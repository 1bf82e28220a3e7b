import errno
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from worker.distill.students.recipe import load_model
from worker.distill.training import checkpoint
from worker.distill.training.checkpoint import (
    Snapshot,
    TrainState,
    copy_model,
    load_optimizer,
    load_state,
    prune_checkpoints,
    save_checkpoint,
)
from worker.errors import CorruptCheckpoint, DiskFull

MakeSnapshot = Callable[..., Snapshot]


@pytest.fixture
def make_snapshot(tiny_llama_dir: Path, tokenizer: PreTrainedTokenizerBase) -> MakeSnapshot:
    """A function that makes a model and its optimizer after so many steps on random numbers."""

    def make(step: int = 3, best_dir: Path | None = None) -> Snapshot:
        torch.manual_seed(7)
        model = load_model(tiny_llama_dir)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        for _ in range(step):
            model(input_ids=torch.randint(0, 300, (2, 8))).logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return Snapshot(TrainState(step=step, batch=2), model, tokenizer, optimizer, best_dir)

    return make


def test_what_is_loaded_goes_on_with_the_same_bits(
    make_snapshot: MakeSnapshot, tmp_path: Path
) -> None:
    snapshot = make_snapshot()
    folder = save_checkpoint(tmp_path, snapshot)
    random_after = torch.rand(4)

    torch.manual_seed(99)
    state, model = load_state(folder), load_model(folder / "model")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    load_optimizer(folder, optimizer, model)
    assert state == snapshot.state
    assert torch.equal(torch.rand(4), random_after)
    tokens_BT = torch.arange(5, 21).view(2, 8)
    for one, stepper in ((snapshot.model, snapshot.optimizer), (model, optimizer)):
        one(input_ids=tokens_BT).logits.square().mean().backward()
        stepper.step()
    for ours, theirs in zip(model.parameters(), snapshot.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_copy_in_bfloat16_has_the_rounded_weights(
    make_snapshot: MakeSnapshot, tmp_path: Path
) -> None:
    snapshot = make_snapshot()
    shards = tmp_path / "shards"
    snapshot.model.save_pretrained(shards, max_shard_size="200KB")
    for source in (save_checkpoint(tmp_path, snapshot) / "model", shards):
        copy = copy_model(source, tmp_path / "student", torch.bfloat16)
        rounded = AutoModelForCausalLM.from_pretrained(copy, dtype="auto")
        assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
        for ours, theirs in zip(rounded.parameters(), snapshot.model.parameters(), strict=True):
            assert torch.equal(ours, theirs.bfloat16())
        assert {path.name for path in copy.iterdir()} == {path.name for path in source.iterdir()}
    assert len(list(shards.glob("*.safetensors"))) > 1
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in rounded.parameters())
    plain = copy_model(shards, tmp_path / "student", None)
    assert (plain / "config.json").stat().st_ino == (shards / "config.json").stat().st_ino


def test_the_model_folder_can_be_served(make_snapshot: MakeSnapshot, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, make_snapshot()) / "model"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who?"}], add_generation_prompt=True
    )
    ids_BT = torch.tensor([prompt["input_ids"]])
    made = model.generate(
        ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=3, do_sample=False
    )
    assert made.shape[1] > ids_BT.shape[1]


@pytest.mark.parametrize(
    "name", ["state.json", "optimizer.safetensors", "rng.safetensors", "model/model.safetensors"]
)
def test_a_flipped_bit_is_noticed(make_snapshot: MakeSnapshot, tmp_path: Path, name: str) -> None:
    path = save_checkpoint(tmp_path, make_snapshot()) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=name):
        load_state(path.parents[name.count("/")])


@pytest.mark.parametrize(
    "name", ["manifest.json", "state.json", "optimizer.safetensors", "model/config.json"]
)
def test_a_missing_file_is_noticed(make_snapshot: MakeSnapshot, tmp_path: Path, name: str) -> None:
    folder = save_checkpoint(tmp_path, make_snapshot())
    (folder / name).unlink()
    with pytest.raises(CorruptCheckpoint):
        load_state(folder)


def test_a_manifest_that_forgets_the_weights_is_no_checkpoint(
    make_snapshot: MakeSnapshot, tmp_path: Path
) -> None:
    folder = save_checkpoint(tmp_path, make_snapshot())
    files = json.loads((folder / "manifest.json").read_text())["files"]
    kept = [entry for entry in files if not entry["path"].endswith(".safetensors")]
    (folder / "manifest.json").write_text(json.dumps({"files": kept}))
    with pytest.raises(CorruptCheckpoint, match="lacks"):
        load_state(folder)


def test_a_run_killed_while_writing_leaves_no_checkpoint_of_that_step(
    make_snapshot: MakeSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_write_manifest", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, make_snapshot(step=1))
    assert not (tmp_path / "step-1").exists()
    monkeypatch.undo()
    assert load_state(save_checkpoint(tmp_path, make_snapshot(step=1))).step == 1


def test_a_worker_never_sees_a_part_of_a_checkpoint_that_is_deleted(
    make_snapshot: MakeSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, newest = (save_checkpoint(tmp_path, make_snapshot(step=i)) for i in (1, 2))
    remove, was_visible = shutil.rmtree, []

    def watched(path: Path, **options: Any) -> None:  # Any: the arguments of rmtree
        was_visible.append(old.exists())
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    prune_checkpoints(tmp_path, keep_newest=1, keep_step=None)
    assert not was_visible[-1]
    assert list(tmp_path.iterdir()) == [newest]


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(
    make_snapshot: MakeSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save_checkpoint(tmp_path, make_snapshot(step=1))

    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_manifest", full)
    with pytest.raises(DiskFull, match="free some disk"):
        save_checkpoint(tmp_path, make_snapshot(step=2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert load_state(before).step == 1


def test_room_that_gives_out_under_safetensors_is_a_full_disk_too(
    make_snapshot: MakeSnapshot, tmp_path: Path
) -> None:
    before = save_checkpoint(tmp_path, make_snapshot(step=1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the kernel refuses as it does on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(DiskFull, match="free some disk"):
            save_checkpoint(tmp_path, make_snapshot(step=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert load_state(before).step == 1


def test_room_that_gives_out_under_the_tokenizer_is_a_full_disk_too(
    make_snapshot: MakeSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = make_snapshot(step=1)
    save_pretrained = snapshot.tokenizer.save_pretrained
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_with_little_room(folder: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
        try:
            save_pretrained(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(snapshot.tokenizer, "save_pretrained", save_with_little_room)
    with pytest.raises(DiskFull, match="free some disk"):
        save_checkpoint(tmp_path, snapshot)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_noticed_before_writing(
    make_snapshot: MakeSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DiskFull, match=r"needs .* MiB"):
        save_checkpoint(tmp_path, make_snapshot())
    assert list(tmp_path.iterdir()) == []


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (2, 4, 10, 12):
        (tmp_path / f"step-{step}").mkdir()
    prune_checkpoints(tmp_path, keep_newest=2, keep_step=2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-2", "step-10", "step-12"}


def test_the_best_student_outlives_its_own_checkpoint(
    make_snapshot: MakeSnapshot, tmp_path: Path
) -> None:
    best = save_checkpoint(tmp_path, make_snapshot(step=1)) / "model"
    weights = (best / "model.safetensors").read_bytes()
    later = save_checkpoint(tmp_path, make_snapshot(step=2, best_dir=best))
    shutil.rmtree(best.parent)
    load_state(later)
    assert (later / "best" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("kind", ["fused", "capturable"])
def test_a_loaded_optimizer_lies_where_torch_wants_it(
    make_snapshot: MakeSnapshot, tmp_path: Path, kind: str
) -> None:
    folder = save_checkpoint(tmp_path, make_snapshot())
    model = make_snapshot().model.to("meta")  # stands for a card
    optimizer = torch.optim.AdamW(
        model.parameters(), fused=kind == "fused", capturable=kind == "capturable"
    )
    load_optimizer(folder, optimizer, model)
    assert optimizer.state
    for parameter, state in optimizer.state.items():
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert {tensor.device for tensor in state.values()} == {parameter.device}
        assert state["step"].dtype == torch.float32


def test_a_plain_optimizer_counts_its_steps_on_the_cpu(
    make_snapshot: MakeSnapshot, tmp_path: Path
) -> None:
    folder = save_checkpoint(tmp_path, make_snapshot())
    model = make_snapshot().model.to("meta")
    optimizer = torch.optim.AdamW(model.parameters())
    load_optimizer(folder, optimizer, model)
    assert {state["step"].device.type for state in optimizer.state.values()} == {"cpu"}
