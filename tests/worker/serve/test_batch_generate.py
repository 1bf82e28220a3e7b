"""A pile of prompts against `generate()` one at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.contracts.architectures import ARCHITECTURES
from tests.worker.serve.decoding.test_families import tiny
from worker.cpu import prepare_for_inference
from worker.cpu.kernels.bindings import kernels
from worker.distill.data.rows import Example
from worker.distill.teachers.cached_teacher import LiveTeacher
from worker.serve.batch_generate import Continuation, generate_all
from worker.serve.decoding.cursor_batch import CursorBatch
from worker.serve.errors import BadLogits, PromptTooLong
from worker.serve.loading import LoadedModel, load_model

DISTILLED = sorted(
    known.model_type
    for known in ARCHITECTURES.values()
    if known.kind == "causal" and known.is_distilled
)
PROMPTS = [[5, 6, 7], [200], [31, 80, 9, 14, 15, 92, 65], [3] * 30, [40, 41], [77, 5, 300, 12]]


def test_greedy_continuations_equal_generate(loaded: LoadedModel) -> None:
    for prompt, found in zip(
        PROMPTS, generate_all(loaded.model, PROMPTS, max_new_tokens=30, max_running=3), strict=True
    ):
        inputs = torch.tensor([prompt])
        expected = loaded.model.generate(  # type: ignore[operator]  # a method, typed as a tensor
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=30, do_sample=False
        )[0, len(prompt) :].tolist()
        assert list(found.tokens) == expected


def test_an_end_token_is_included_and_makes_it_finished(llama: LoadedModel) -> None:
    [free] = generate_all(llama.model, [[5, 6, 7]], max_new_tokens=12, end_ids=frozenset())
    assert (len(free.tokens), free.is_finished) == (12, False)
    end = free.tokens[5]
    [ended] = generate_all(llama.model, [[5, 6, 7]], max_new_tokens=12, end_ids=frozenset({end}))
    assert ended == Continuation(free.tokens[: free.tokens.index(end) + 1], is_finished=True)


def test_sampling_does_not_depend_on_the_neighbours(loaded: LoadedModel) -> None:
    together = generate_all(
        loaded.model, PROMPTS, max_new_tokens=12, temperature=0.8, top_p=0.9, seed=100
    )
    alone = [
        generate_all(
            loaded.model, [prompt], max_new_tokens=12, temperature=0.8, top_p=0.9, seed=100 + index
        )[0]
        for index, prompt in enumerate(PROMPTS)
    ]
    assert together == alone


def test_in_bfloat16_by_tiles_a_row_is_the_same_to_the_bit_whatever_runs_beside_it(
    tiny_llama_dir: Path,
) -> None:
    ops = kernels()
    if ops is None or not ops.has_tiles:
        pytest.skip("this processor has no tiles")
    model = load_model(tiny_llama_dir, weights="bfloat16", keeps_plain=False).model
    crowd = CursorBatch(model, max_rows=32, max_width=64)
    rows = [[token, *prompt] for token in range(10, 13) for prompt in PROMPTS]
    said = [crowd.join(rows[:7]), crowd.join(rows[7:])]
    together = [torch.cat(said), *(crowd.advance([step] * len(rows)) for step in range(5, 9))]
    for number, row in enumerate(rows):
        alone = CursorBatch(model, max_rows=32, max_width=64)
        first = alone.join([row[:1]])
        for token in row[1:]:
            first = alone.advance([token])
        assert torch.equal(first[0], together[0][number])
        for step in range(5, 9):
            assert torch.equal(alone.advance([step])[0], together[step - 4][number])


def test_seeds_may_be_given_one_by_one(llama: LoadedModel) -> None:
    def run(seeds: list[int]) -> list[Continuation]:
        return generate_all(
            llama.model, [[5, 6]] * 3, max_new_tokens=8, temperature=1.0, seeds=seeds
        )

    first, second, third = run([7, 8, 7])
    assert first == third != second


def test_answers_and_progress_are_told_as_they_come(llama: LoadedModel) -> None:
    answers: dict[int, Continuation] = {}
    progress: list[tuple[int, int]] = []
    result = generate_all(
        llama.model,
        PROMPTS,
        max_new_tokens=9,
        max_running=2,
        on_answer=answers.__setitem__,
        on_progress=lambda done, tokens: progress.append((done, tokens)),
    )
    assert [answers[index] for index in range(len(PROMPTS))] == result
    assert progress == sorted(progress)
    assert progress[-1] == (len(PROMPTS), sum(len(found.tokens) for found in result))


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("model_type", DISTILLED)
def test_states_are_those_of_a_forward_pass_over_prompt_and_answer(
    model_type: str, *, is_packed: bool
) -> None:
    model = tiny(model_type).float()
    if is_packed:
        prepare_for_inference(model, exact=model.get_output_embeddings())
    states: dict[int, Tensor] = {}
    prompts = [[token % 200 for token in prompt] for prompt in PROMPTS]
    [free] = generate_all(model, prompts[:1], max_new_tokens=9, end_ids=frozenset())
    made = generate_all(
        model,
        prompts,
        max_new_tokens=9,
        max_running=3,
        end_ids=frozenset({free.tokens[4]}),  # this answer ends early
        on_states=states.__setitem__,
    )
    assert made[0].is_finished
    examples = [
        Example(tuple(prompt)).answered(found.tokens)
        for prompt, found in zip(prompts, made, strict=True)
    ]
    expected = LiveTeacher(tiny(model_type).float()).hidden(examples)
    for index, expected_TH in enumerate(expected):
        # float32 sums in another order
        torch.testing.assert_close(states[index], expected_TH, rtol=1e-3, atol=1e-3)


def test_no_hook_stays_on_the_model(llama: LoadedModel) -> None:
    model: Any = llama.model  # transformers is untyped here
    generate_all(model, PROMPTS, max_new_tokens=2, on_states=lambda i, states_TH: None)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_what_a_callback_raises_ends_the_call(llama: LoadedModel) -> None:
    def stop(_index: int, _answer: Continuation) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_all(llama.model, PROMPTS, max_new_tokens=9, on_answer=stop)


def test_an_answer_is_cut_where_the_context_ends(llama: LoadedModel) -> None:
    [found] = generate_all(llama.model, [[5] * 250], max_new_tokens=30, end_ids=frozenset())
    assert len(found.tokens) == 6


@pytest.mark.parametrize("length", [0, 256])
def test_a_prompt_without_room_is_refused(llama: LoadedModel, length: int) -> None:
    with pytest.raises(PromptTooLong):
        generate_all(llama.model, [[5] * length], max_new_tokens=4)


def test_no_prompts_give_no_continuations(llama: LoadedModel) -> None:
    assert generate_all(llama.model, [], max_new_tokens=4) == []


def test_a_model_in_training_is_put_back_and_can_go_on(tiny_llama_dir: Path) -> None:
    model = load_model(tiny_llama_dir).model.train().requires_grad_(True)
    generate_all(model, PROMPTS, max_new_tokens=4)
    assert model.training
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_weights_that_are_no_numbers_are_an_error(tiny_llama_dir: Path) -> None:
    model = load_model(tiny_llama_dir).model
    next(model.parameters()).fill_(torch.nan)
    with pytest.raises(BadLogits):
        generate_all(model, PROMPTS, max_new_tokens=4)
