from pathlib import Path

import pytest
import torch

from tests.tiny import save_tiny
from worker.distill.students.recipe import load_model
from worker.serve.batch_generate import generate_all
from worker.serve.decoding.cursor_batch import CursorBatch
from worker.serve.decoding.grouped_attention import use_grouped_attention
from worker.serve.device_memory import PrefillMemory

pytestmark = pytest.mark.gpu
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [12]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "t5"])
def test_a_card_writes_the_greedy_text_of_a_cpu(family: str, tmp_path: Path) -> None:
    model = load_model(save_tiny(tmp_path / family, family)).requires_grad_(False)
    on_cpu = [made.tokens for made in generate_all(model, PROMPTS, max_new_tokens=16)]
    on_card = [made.tokens for made in generate_all(model.to("cuda"), PROMPTS, max_new_tokens=16)]
    assert on_card == on_cpu


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "t5", "bart"])
def test_graphs_write_the_greedy_text_of_a_cpu(family: str, tmp_path: Path) -> None:
    """Also if sequences join and leave, and if more shapes occur than graphs are kept."""
    model = load_model(save_tiny(tmp_path / family, family)).requires_grad_(False)
    prompts = [[5 + number] * (1 + 7 * number) for number in range(12)]
    on_cpu = generate_all(model, prompts, max_new_tokens=40, max_running=5)
    on_card = generate_all(
        model.to("cuda"), prompts, max_new_tokens=40, max_running=5, steps="graphs"
    )
    assert on_card == on_cpu


def test_graphs_are_recorded_and_replayed(tiny_llama_dir: Path) -> None:
    model = load_model(tiny_llama_dir, torch.bfloat16).to("cuda").requires_grad_(False)
    use_grouped_attention(model)
    batch = CursorBatch(model, max_rows=4, max_width=128)
    batch.join(PROMPTS)
    logits = [batch.advance([7, 8, 9]).clone() for _ in range(6)]
    assert all(logits_NV.isfinite().all() for logits_NV in logits)
    assert batch.static is not None
    assert batch.static.graphs is not None
    assert not batch.static.is_off
    assert batch.static.graphs.num_replayed == 5
    assert batch.static.num_bytes > 0


def test_a_long_prompt_is_read_in_chunks(tiny_llama_dir: Path) -> None:
    model = load_model(tiny_llama_dir).to("cuda").requires_grad_(False)
    prompt = [5 + number % 90 for number in range(100)]
    whole, chunked = (CursorBatch(model, max_rows=1, max_width=128) for _ in range(2))

    class SmallMemory(PrefillMemory):
        def num_tokens(self, num_columns: int) -> int:
            return 16

    chunked.prefill_memory = SmallMemory(1, 1)
    torch.testing.assert_close(chunked.join([prompt]), whole.join([prompt]), rtol=1e-3, atol=1e-3)


def test_a_model_in_bfloat16_writes_on_a_card(tiny_llama_dir: Path) -> None:
    model = load_model(tiny_llama_dir, torch.bfloat16).to("cuda").requires_grad_(False)
    made = generate_all(model, PROMPTS, max_new_tokens=8, temperature=1.0, end_ids=frozenset())
    assert [len(one.tokens) for one in made] == [8, 8, 8]
    assert all(0 <= token < model.config.vocab_size for one in made for token in one.tokens)
