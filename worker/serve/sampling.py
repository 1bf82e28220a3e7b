"""Picks one token a row: greedy, or by temperature, top-k and top-p, each row with its own generator."""

# N rows, V vocabulary, S sampled (not greedy) rows
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


def seeded_generator(seed: int | None) -> torch.Generator:
    """A generator of its own for one sequence; without a seed, one that no other shares."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed % 2**63)
    return generator


@dataclass(frozen=True)
class Chooser:
    """How one row picks tokens. num_logprobs None: no log-probabilities; 0: the chosen token's only."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    num_logprobs: int | None = None
    generator: torch.Generator = field(default_factory=lambda: seeded_generator(None))

    @property
    def is_filtered(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0


@dataclass(frozen=True)
class Pick:
    """A chosen token; token is None when the row's logits were not numbers."""

    token: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def pick_tokens(logits_NV: Tensor, choosers: Sequence[Chooser]) -> list[Pick]:
    """One pick a row of float32 logits. A row's pick does not depend on its neighbours."""
    best_N, tokens_N = logits_NV.max(dim=-1)
    sampled = [row for row, chooser in enumerate(choosers) if chooser.temperature > 0]
    if sampled:
        drawn_S = _draw(logits_NV[sampled], [choosers[row] for row in sampled])
        tokens_N[sampled] = drawn_S
    is_good = torch.isfinite(best_N).tolist()  # max passes NaN on
    tokens = tokens_N.tolist()
    picks = [Pick(token if good else None) for token, good in zip(tokens, is_good, strict=True)]
    for row, chooser in enumerate(choosers):
        if chooser.num_logprobs is not None and is_good[row]:
            picks[row] = _with_logprobs(logits_NV[row], tokens[row], chooser.num_logprobs)
    return picks


def _draw(logits_SV: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    temperature_S1 = torch.tensor([[c.temperature] for c in choosers], device=logits_SV.device)
    scaled_SV = logits_SV / temperature_S1
    filtered = [row for row, chooser in enumerate(choosers) if chooser.is_filtered]
    if filtered:
        scaled_SV[filtered] = _filter(scaled_SV[filtered], [choosers[row] for row in filtered])
    mass_SV = scaled_SV.softmax(dim=-1).double().cumsum(dim=-1)
    uniform_S1 = torch.cat([torch.rand(1, 1, generator=c.generator, dtype=torch.float64) for c in choosers])
    target_S1 = uniform_S1.to(mass_SV.device) * mass_SV[:, -1:]
    # right: a target of exactly 0 must not fall on a first token of probability 0
    drawn_S1 = torch.searchsorted(mass_SV, target_S1, right=True)
    return drawn_S1[:, 0].clamp(max=logits_SV.shape[-1] - 1)


def _filter(logits_SV: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    num_tokens = logits_SV.shape[-1]
    top_k_S1 = torch.tensor([[c.top_k or num_tokens] for c in choosers], device=logits_SV.device)
    top_p_S1 = torch.tensor([[c.top_p] for c in choosers], device=logits_SV.device, dtype=torch.float64)
    sorted_SV, order_SV = logits_SV.sort(dim=-1, descending=True, stable=True)
    ranks_V = torch.arange(num_tokens, device=logits_SV.device)
    is_dropped_SV = ranks_V >= top_k_S1
    probabilities_SV = sorted_SV.masked_fill(is_dropped_SV, -torch.inf).softmax(dim=-1).double()
    mass_before_SV = probabilities_SV.cumsum(dim=-1) - probabilities_SV
    is_dropped_SV |= (mass_before_SV >= top_p_S1) & (ranks_V > 0)  # the best token always stays
    return logits_SV.masked_fill(
        torch.zeros_like(is_dropped_SV).scatter(1, order_SV, is_dropped_SV), -torch.inf
    )


def _with_logprobs(logits_V: Tensor, token: int, num_top: int) -> Pick:
    logprobs_V = logits_V.log_softmax(dim=-1)
    values, tokens = logprobs_V.topk(min(num_top, logprobs_V.shape[-1]))
    top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return Pick(token, float(logprobs_V[token]), top)
