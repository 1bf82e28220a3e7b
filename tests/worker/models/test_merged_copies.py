"""Checkpoints with adapters, as serve workers and training runs read them."""

from pathlib import Path

import fsspec
import pytest
import torch

from app.artifact_cache import ArtifactCache
from app.contracts.distillation import Distillation, Lora
from app.contracts.messages import ArtifactRef
from app.storage import Store
from tests.adapters import save_adapted
from worker.distill.students.lora import add_lora, lora_tensors
from worker.distill.students.recipe import load_model
from worker.jobs.run_specs import adapter_starts
from worker.models.merged_copies import plain_folder
from worker.protocol.run_spec import RunSpec
from worker.train import with_plain_models

RANK_4 = Lora(rank=4)
TOKENS_BT = torch.arange(3, 23).view(2, 10)


@torch.no_grad()
def put_checkpoint(store: Store, start: ArtifactRef, start_dir: Path, folder: Path) -> ArtifactRef:
    """Stores a checkpoint with random adapters, and returns the reference to its model."""
    model = load_model(start_dir)
    add_lora(model, RANK_4, seed=0)
    for tensor in lora_tensors(model).values():
        tensor.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(1))
    save_adapted(model, folder / "model", RANK_4, start=start)
    ref = store.put_folder(folder, "checkpoints/a/1/step-5")
    return ArtifactRef(key=f"{ref.key}/model", bytes=ref.bytes)


def outputs(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = load_model(folder)(input_ids=TOKENS_BT).logits
    return logits


@pytest.mark.parametrize("is_local", [True, False])
def test_adapters_are_merged_once_for_serving(
    tiny_llama_dir: Path, tmp_path: Path, *, is_local: bool
) -> None:
    store = Store(str(tmp_path / "store") if is_local else "memory://adapters")
    start = store.put_folder(tiny_llama_dir, "models/tiny")
    ref = put_checkpoint(store, start, tiny_llama_dir, tmp_path / "step")
    copies = ArtifactCache(store, tmp_path / "copies", 10**9)
    folder = plain_folder(copies, ref)
    assert not torch.allclose(outputs(folder), outputs(tiny_llama_dir), atol=1e-2)
    inode = (folder / "config.json").stat().st_ino
    assert (plain_folder(copies, ref) / "config.json").stat().st_ino == inode
    store.delete("models/tiny")
    copies.make_room(10**9)  # a copy in use stays
    assert plain_folder(copies, ref) == folder
    copies.retain(())
    copies.make_room(10**9)
    with pytest.raises(FileNotFoundError):
        plain_folder(copies, ref)
    copies.close()
    if not is_local:
        fsspec.filesystem("memory").rm("/adapters", recursive=True)


def test_a_run_merges_the_adapters_that_it_starts_from(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    store = Store(str(tmp_path / "store"))
    start = store.put_folder(tiny_llama_dir, "models/tiny")
    ref = put_checkpoint(store, start, tiny_llama_dir, tmp_path / "step")
    copies = ArtifactCache(store, tmp_path / "copies", 10**9)
    adapters_dir = Path(store.fetch_folder(ref, tmp_path))
    spec = RunSpec(
        distillation=Distillation(teacher="tiny"),
        teacher_dir=tiny_llama_dir,
        start_dir=adapters_dir,
        adapter_starts=adapter_starts((tiny_llama_dir, adapters_dir), copies),
        training_path=tmp_path / "rows.jsonl",
        cache_dir=tmp_path / "cache",
    )
    plain = with_plain_models(RunSpec.model_validate_json(spec.model_dump_json()), tmp_path / "in")
    assert plain.teacher_dir == tiny_llama_dir
    served = plain_folder(copies, ref)
    assert torch.equal(outputs(plain.start_dir), outputs(served))
