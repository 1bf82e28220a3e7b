"""Log-probabilities of prompt tokens against a plain forward pass, for every family."""

import copy
import random

import pytest
import torch

from tests.worker.serve.decoding.test_families import tiny
from worker.cpu.linear_ops import pack_weights
from worker.cpu.llama_decoder import fuse_projections
from worker.serve.decoding import cursor_batch
from worker.serve.decoding.cursor_batch import CursorBatch
from worker.serve.decoding.families import CAUSAL
from worker.serve.decoding.prompt_scores import PromptScores

pytestmark = pytest.mark.usefixtures("small_first_buffers")


def prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 200) for _ in range(length)] for length in (1, 23, 9)]


@pytest.mark.parametrize("model_type", sorted(CAUSAL))
def test_scores_equal_a_plain_forward_pass_while_other_rows_run(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = CursorBatch(tiny(model_type), max_rows=6, max_width=64)
    monkeypatch.setattr(cursor_batch, "LOGIT_BYTES", 4 * 200 * 3 * 4)  # chunks of 4 columns
    batch.join([[5, 6, 7]])
    scored = prompts(seed=2)
    groups = [scored] if batch.family.can_pad_prompts else [[prompt] for prompt in scored]
    for group in groups:
        scores = PromptScores([(prompt, 3) for prompt in group])
        last_KV = batch.join_scored(group, scores.add)
        for prompt, picks, last_V in zip(group, scores.picks, last_KV, strict=True):
            with torch.no_grad():
                logits_TV = batch.model(torch.tensor([prompt])).logits[0].float()
            torch.testing.assert_close(last_V, logits_TV[-1], rtol=1e-4, atol=1e-4)
            expected_TV = logits_TV.log_softmax(-1)
            assert [pick.token for pick in picks] == prompt
            assert picks[0].logprob is None
            for at, pick in enumerate(picks[1:]):
                assert pick.logprob == pytest.approx(
                    float(expected_TV[at, prompt[at + 1]]), abs=1e-4
                )
                best = expected_TV[at].topk(3)
                assert [token for token, _ in pick.top] == best.indices.tolist()
                assert [value for _, value in pick.top] == pytest.approx(
                    best.values.tolist(), abs=1e-4
                )
    # the rows go on as if they had joined without scores
    advanced_NV = batch.advance([9, 10, 11, 12])
    for row, (prompt, token) in enumerate(zip([[5, 6, 7], *scored], (9, 10, 11, 12), strict=True)):
        with torch.no_grad():
            expected_V = batch.model(torch.tensor([[*prompt, token]])).logits[0, -1].float()
        torch.testing.assert_close(advanced_NV[row], expected_V, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_scores_of_a_model_as_a_worker_keeps_it_are_its_own(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(model_type).float()
    kept = copy.deepcopy(model)
    fuse_projections(kept)
    pack_weights(kept, keeps_plain=False)
    monkeypatch.setattr(cursor_batch, "LOGIT_BYTES", 4 * 200 * 3 * 4)  # chunks of 4 columns
    batch, scored = CursorBatch(kept, max_rows=6, max_width=64), prompts(seed=4)
    scores = PromptScores([(prompt, 0) for prompt in scored])
    batch.join_scored(scored, scores.add)
    for prompt, picks in zip(scored, scores.picks, strict=True):
        with torch.no_grad():
            expected_TV = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        expected = [float(expected_TV[at, token]) for at, token in enumerate(prompt[1:])]
        assert [pick.logprob for pick in picks[1:]] == pytest.approx(expected, abs=1e-3)


def test_the_best_token_has_exactly_the_value_of_the_best_alternative() -> None:
    logits_1QV = torch.randn(1, 5, 50)
    best = logits_1QV[0].argmax(-1).tolist()
    scores = PromptScores([([7, *best], 1)])
    scores.add(0, logits_1QV)
    assert [pick.token for pick in scores.picks[0]] == [7, *best]
    assert all(pick.logprob == pick.top[0][1] for pick in scores.picks[0][1:])


def test_an_impossible_token_has_a_finite_value_and_a_damaged_one_has_none() -> None:
    logits_1QV = torch.zeros(1, 3, 8)
    logits_1QV[0, 0, 4] = -torch.inf
    logits_1QV[0, 1, 0] = torch.nan
    scores = PromptScores([([1, 4, 5], 0)])
    scores.add(0, logits_1QV)
    assert scores.picks[0][1].logprob == -9999.0
    assert scores.picks[0][2].token is None
