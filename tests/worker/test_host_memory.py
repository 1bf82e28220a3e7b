"""Peak memory of the host while a model is imported, or a student is built from one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny import tiny_tokenizer

SECONDS = 120
SPARE_BYTES = 24 * 2**20  # for activations and fragmentation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models of 4 layers in bfloat16: `large` has about 100 MB, `tiny` almost none."""
    found, tokenizer = tmp_path_factory.mktemp("memory"), tiny_tokenizer()
    for name, width in (("large", 1024), ("tiny", 64)):
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(found / name)
        tokenizer.save_pretrained(found / name)
    return found


def added_bytes(task: str, folder: Path, out: Path) -> int:
    done = subprocess.run(
        [sys.executable, "-m", "tests.worker.memory_child", task, folder, out],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def test_an_import_holds_one_copy_of_the_weights(folder: Path, tmp_path: Path) -> None:
    weights = folder / "large" / "model.safetensors"
    assert added_bytes("import", folder, tmp_path) < 1.2 * weights.stat().st_size + SPARE_BYTES
    imported = tmp_path / "large" / "model" / "model.safetensors"
    ours, theirs = load_file(imported), load_file(weights)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_student_needs_only_its_own_weights_beside_its_mapped_start(
    folder: Path, tmp_path: Path
) -> None:
    start_bytes = (folder / "large" / "model.safetensors").stat().st_size
    student_bytes = 2 * start_bytes / 4  # in float32, one of four layers
    most = start_bytes + 1.2 * student_bytes + SPARE_BYTES
    assert added_bytes("student", folder, tmp_path) < most
