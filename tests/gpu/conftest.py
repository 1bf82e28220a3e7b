"""Tests that need a card: `make gpu-check` runs them; elsewhere they are skipped."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from worker.protocol.run_spec import RunSpec

Json = dict[str, Any]  # Any: open-ended JSON


@pytest.fixture(autouse=True)
def card() -> Iterator[None]:
    """Full float32 products, unless the test is of something else."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def make_spec(tmp_path: Path, tiny_llama_dir: Path) -> Callable[..., RunSpec]:
    """A function that makes the spec of a small run; `block` goes into the distillation block."""
    rows = [
        {
            "prompt": f"Who keeps house number {i}?",
            "completion": f"The student keeps the house {i}.",
        }
        for i in range(40)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(block: Json | None = None, **spec: Any) -> RunSpec:
        numbers = {"n_epochs": 6, "batch_tokens": 256, "learning_rate": 3e-3}
        evaluation = {"metrics": ["perplexity", "agreement"], "num_samples": 0}
        fields = {
            "training_path": path,
            "cache_dir": tmp_path / "cache",
            "num_processes": 1,
            **spec,
        }
        return RunSpec.model_validate(
            {
                "distillation": {
                    "teacher": "tiny",
                    "hyperparameters": numbers,
                    "evaluation": evaluation,
                    **(block or {}),
                },
                "teacher_dir": tiny_llama_dir,
                "start_dir": tiny_llama_dir,
                **fields,
            }
        )

    return make
