"""Loaded tiny models, requests, and the slow obvious way to get what the batch gives."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.contracts.generation import Delta, GenerateRequest, Reply, Sampling
from app.contracts.messages import ArtifactRef
from worker.serve.decoding.cursor_batch import CursorBatch
from worker.serve.engine import Engine, TransformersEngine
from worker.serve.loading import LoadedModel, load_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama(tiny_llama_dir: Path) -> LoadedModel:
    return load_model(tiny_llama_dir)


@pytest.fixture(scope="session")
def gpt2(tiny_gpt2_dir: Path) -> LoadedModel:
    return load_model(tiny_gpt2_dir)


@pytest.fixture(params=["llama", "gpt2"])
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    """Each of the two families the first issue promises."""
    found: LoadedModel = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="session")
def t5(tiny_t5_dir: Path) -> LoadedModel:
    return load_model(tiny_t5_dir)


@pytest.fixture(scope="session")
def bart(tiny_bart_dir: Path) -> LoadedModel:
    return load_model(tiny_bart_dir)


@pytest.fixture(scope="session")
def bert2bert(tiny_bert2bert_dir: Path) -> LoadedModel:
    return load_model(tiny_bert2bert_dir)


@pytest.fixture(params=["t5", "bart", "bert2bert"])
def encoder_decoder(request: pytest.FixtureRequest) -> LoadedModel:
    found: LoadedModel = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def make_request() -> Callable[..., GenerateRequest]:
    """A greedy request for four tokens unless told otherwise; unknown words go to its sampling."""

    def make(
        request_id: str = "r", **given: Any
    ) -> GenerateRequest:  # Any: fields of two contracts
        own = {
            name: given.pop(name) for name in list(given) if name in GenerateRequest.model_fields
        }
        prompt = {"text": "The still"} if not own.keys() & {"text", "tokens", "messages"} else {}
        defaults = {
            "reply_to": "api",
            "model": "tiny",
            "weights": ArtifactRef(key="models/tiny", bytes=1000),
            "deadline_at": time.time() + 600,
        }
        sampling = Sampling(**{"max_tokens": 4, "temperature": 0.0} | given)
        return GenerateRequest(id=request_id, sampling=sampling, **(defaults | prompt | own))

    return make


@pytest.fixture
def make_engine() -> Callable[..., TransformersEngine]:
    def make(
        loaded: LoadedModel, **given: Any
    ) -> TransformersEngine:  # Any: the engine's own fields
        options = {"max_running": 6, "max_context_tokens": 256} | given
        return TransformersEngine(loaded.model, loaded.tokenizer, **options)

    return make


@pytest.fixture
def drain() -> Callable[[Engine], list[Reply]]:
    """Steps an engine until it has nothing to do."""

    def run(engine: Engine) -> list[Reply]:
        replies: list[Reply] = []
        while engine.has_work():
            replies += engine.step()
        return replies

    return run


@pytest.fixture
def text_of() -> Callable[..., str]:
    def join(replies: list[Reply], request_id: str = "r", choice: int = 0) -> str:
        deltas = [reply for reply in replies if isinstance(reply, Delta)]
        return "".join(d.text for d in deltas if (d.id, d.choice) == (request_id, choice))

    return join


NextLogits = Callable[..., Tensor]


@pytest.fixture
def next_logits() -> NextLogits:
    """A plain forward pass over one whole sequence, no cache; of an encoder-decoder, with what it encodes."""

    def forward(model: nn.Module, tokens: list[int], source: list[int] | None = None) -> Tensor:
        tokens_1T = torch.tensor([tokens])
        inputs = {"input_ids": tokens_1T}
        if source is not None:
            inputs = {"input_ids": torch.tensor([source]), "decoder_input_ids": tokens_1T}
        with torch.no_grad():
            logits: Tensor = model(**inputs, use_cache=False).logits[0, -1]
        return logits

    return forward


@dataclass
class _Row:
    tokens: list[int]
    source: list[int] | None = None

    def copy(self) -> "_Row":
        return _Row(list(self.tokens), self.source)


@pytest.fixture
def largest_difference(next_logits: NextLogits) -> Callable[..., float]:
    """Drives a batch with random joins, forks, steps and leaves, and compares every row with a plain forward pass.

    The logits are compared, not the chosen tokens: random models repeat themselves and hide mistakes.
    """

    def drive(batch: CursorBatch, *, seed: int, num_moves: int = 120, longest: int = 20) -> float:
        rng = random.Random(seed)
        rows: list[_Row] = []
        worst = 0.0
        beginnings = [[rng.randrange(3, 200) for _ in range(longest // 2)] for _ in range(2)]

        def prompt_of(num_tokens: int) -> list[int]:
            shared = rng.choice(([], *beginnings))[: num_tokens - 1]
            return [*shared, *(rng.randrange(3, 200) for _ in range(num_tokens - len(shared)))]

        def check(logits_NV: Tensor, first_row: int) -> None:
            nonlocal worst
            for row, logits_V in zip(rows[first_row:], logits_NV, strict=True):
                expected = next_logits(batch.model, row.tokens, row.source)
                worst = max(worst, float((logits_V - expected).abs().max() / expected.abs().max()))

        def row_of(prompt: list[int]) -> _Row:
            if batch.family.has_encoder:
                return _Row([batch.family.start_token], prompt)
            return _Row(list(prompt))

        for _ in range(num_moves):
            num_free = batch.max_rows - len(rows)
            move = rng.choice(["join", "fork", "leave", *["step"] * 5])
            if move == "join" and num_free:
                prompts = [
                    prompt_of(rng.randint(1, longest))
                    for _ in range(rng.randint(1, min(3, num_free)))
                ]
                rows += [row_of(prompt) for prompt in prompts]
                check(batch.join(prompts), len(rows) - len(prompts))
            elif move == "fork" and num_free and rows:
                source = rng.randrange(len(rows))
                assert batch.fork(source) == len(rows)
                rows.append(rows[source].copy())
            elif move == "leave" and rows:
                row = rng.randrange(len(rows))
                batch.leave(row)
                last = rows.pop()
                if row < len(rows):
                    rows[row] = last
            elif move == "step" and rows and max(len(r.tokens) for r in rows) < batch.max_width:
                for each in rows:
                    each.tokens.append(rng.randrange(3, 200))
                check(batch.advance([each.tokens[-1] for each in rows]), 0)
        return worst

    return drive


@pytest.fixture
def small_first_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers that start tiny, so that growing and sliding happen within a short test."""
    monkeypatch.setattr("worker.serve.decoding.kv_cache.FIRST_WIDTH", 16)
    monkeypatch.setattr("worker.serve.decoding.kv_cache.FIRST_ROWS", 2)
