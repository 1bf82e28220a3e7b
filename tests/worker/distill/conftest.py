"""A small distillation to run: tiny models, a few rows, one thread."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.worker.memory_sink import MemorySink
from worker.distill.pipeline import distil
from worker.protocol.run_lines import MetricsLine
from worker.protocol.run_spec import RunSpec
from worker.train import EngineSampler

Json = dict[str, Any]  # Any: open-ended JSON


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The pipeline sets these for its process; here they must not reach other tests."""
    num_threads, is_deterministic = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(is_deterministic)


@pytest.fixture
def tokenizer(tiny_llama_dir: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_llama_dir)
    return loaded


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes rows to a JSONL file."""

    def write(rows: list[Json], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def answered_rows() -> list[Json]:
    """Forty questions of differing length with their answers."""
    return [
        {
            "prompt": f"Who keeps house number {i}{' and the jar' * (i % 4)}?",
            "completion": f"The student keeps the house {i}{' and a lantern' * (i % 5)}.",
        }
        for i in range(40)
    ]


@pytest.fixture
def make_spec(
    tmp_path: Path, tiny_llama_dir: Path, answered_rows: list[Json], write_rows: Callable[..., Path]
) -> Callable[..., RunSpec]:
    """A function that makes a spec; keywords go to its hyperparameters, `block` into the distillation block.

    In float32, and students of layers begin as plain cuts: what most tests compare with.
    """

    def make(
        block: Json | None = None, spec: Json | None = None, **hyperparameters: Any
    ) -> RunSpec:
        block = {
            "evaluation": {"metrics": ["perplexity", "agreement"], "num_samples": 0},
            **(block or {}),
        }
        block["student"] = {"fit_rows": 0, **block.get("student", {})}
        fields: Json = {
            "teacher_dir": tiny_llama_dir,
            "start_dir": tiny_llama_dir,
            "cache_dir": tmp_path / "cache",
            "num_threads": 1,
            **(spec or {}),
        }
        if "training_path" not in fields:
            fields["training_path"] = write_rows(answered_rows)
        numbers = {
            "n_epochs": 2,
            "batch_tokens": 256,
            "learning_rate": 3e-3,
            "precision": "float32",
            **hyperparameters,
        }
        return RunSpec.model_validate(
            {"distillation": {"teacher": "tiny", "hyperparameters": numbers, **block}, **fields}
        )

    return make


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., MemorySink]:
    """A function that runs a spec to its end in this process and gives the lines it said."""

    def run_it(
        spec: RunSpec,
        out: str = "out",
        sink: MemorySink | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> MemorySink:
        sink = sink or MemorySink()
        distil(spec, tmp_path / out, sink, EngineSampler, should_stop or (lambda: False))
        return sink

    return run_it


@pytest.fixture
def series() -> Callable[[MemorySink, str], list[float]]:
    """A function that picks the values of one metric out of the lines."""

    def pick(sink: MemorySink, name: str) -> list[float]:
        return [
            line.values[name]
            for line in sink.lines
            if isinstance(line, MetricsLine) and name in line.values
        ]

    return pick
