from pathlib import Path

import pytest
import torch

from tests.tiny import save_tiny
from worker.distill.students.recipe import load_model
from worker.serve.batch_generate import generate_all

pytestmark = pytest.mark.gpu
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [12]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "t5"])
def test_a_card_writes_the_greedy_text_of_a_cpu(family: str, tmp_path: Path) -> None:
    model = load_model(save_tiny(tmp_path / family, family)).requires_grad_(False)
    on_cpu = [made.tokens for made in generate_all(model, PROMPTS, max_new_tokens=16)]
    on_card = [made.tokens for made in generate_all(model.to("cuda"), PROMPTS, max_new_tokens=16)]
    assert on_card == on_cpu


def test_a_model_in_bfloat16_writes_on_a_card(tiny_llama_dir: Path) -> None:
    model = load_model(tiny_llama_dir, torch.bfloat16).to("cuda").requires_grad_(False)
    made = generate_all(model, PROMPTS, max_new_tokens=8, temperature=1.0, end_ids=frozenset())
    assert [len(one.tokens) for one in made] == [8, 8, 8]
    assert all(0 <= token < model.config.vocab_size for one in made for token in one.tokens)
