"""Samples one token per row, with one random generator per row.

The steps are applied in this order:

1. Logit processors change the raw logits (see worker.serve.decoding.logit_processors). A grammar
   masks the tokens that it does not allow (see worker.serve.grammars.masks).
2. The logits are divided by `temperature`.
3. `top_k`, `top_p` and `min_p` select the tokens that may be drawn, each among those that the
   previous one kept.

Temperature 0 selects the best token after step 1. Log-probabilities are those of the raw logits.
"""

# N rows, V vocabulary, P rows sampled without top-k and top-p, B blocks of W tokens,
# C candidates, best first, K of them kept, R rows of cumulative probability mass
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from app.contracts.generation import Sampling
from worker.host_copies import to_device
from worker.serve.decoding.logit_processors import LogitsProcessor, process_logits
from worker.serve.grammars.constraint import Constraint
from worker.serve.grammars.masks import compute_ahead, mask_logits

MIN_TEMPERATURE = 1e-5  # below, only the best token has any mass, and the logits overflow
BLOCK = 256  # about the square root of a large vocabulary, so that both passes are short
NUM_CANDIDATES = 1024  # top-p nearly always needs fewer tokens; if not, all are sorted


def seeded_generator(seed: int | None) -> torch.Generator:
    """Returns a random generator for one sequence.

    Without a seed, the generator is seeded at random.
    """
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed % 2**63)
    return generator


@dataclass(frozen=True)
class TokenSampler:
    """Sampling parameters and random generator of one row.

    `num_logprobs` is the number of alternatives whose log-probabilities are reported. 0 reports
    those of the chosen token only, None reports none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    num_logprobs: int | None = None
    generator: torch.Generator = field(default_factory=lambda: seeded_generator(None))
    has_seed: bool = False  # True if the same request must give the same tokens
    processor: LogitsProcessor | None = None
    constraint: Constraint | None = None

    @classmethod
    def of(
        cls,
        sampling: Sampling,
        *,
        num_logprobs: int | None,
        seed: int | None,
        processor: LogitsProcessor | None,
        constraint: Constraint | None = None,
    ) -> "TokenSampler":
        """Returns the sampler of one row of a request."""
        return cls(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            num_logprobs=num_logprobs,
            generator=seeded_generator(seed),
            has_seed=seed is not None,
            processor=processor,
            constraint=constraint,
        )

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE

    @property
    def is_ranked(self) -> bool:
        """True if tokens must be sorted, which `min_p` alone does not need."""
        return self.top_k > 0 or self.top_p < 1.0


@dataclass(frozen=True)
class SampledToken:
    """A sampled token. `token` is None if the logits of the row are not finite.

    It is also None if the grammar of the row has failed, see `Constraint.fault`.
    """

    token: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def choose_tokens(logits_NV: Tensor, samplers: Sequence[TokenSampler]) -> list[int | None]:
    """Returns one token per row of processed logits, or None if the logits are not finite.

    The host waits for a GPU once. Tokens of rows whose logits are not finite are drawn too, and
    then ignored.
    """
    best_N, tokens_N = _greatest(logits_NV)
    is_good_N = torch.isfinite(best_N)  # a maximum over NaN is NaN
    sampled = [row for row, c in enumerate(samplers) if not c.is_greedy]
    for draw_rows, is_ranked in ((_draw_from_all, False), (_draw_from_best, True)):
        rows = [row for row in sampled if samplers[row].is_ranked == is_ranked]
        if rows:
            rows_R = to_device(torch.tensor(rows), logits_NV.device)
            tokens_N[rows_R] = draw_rows(logits_NV, rows_R, [samplers[row] for row in rows])
    # -1 stands for a row whose logits are not finite
    tokens: list[int] = tokens_N.where(is_good_N, -1).cpu().tolist()
    return [token if token >= 0 else None for token in tokens]


def _greatest(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `max(dim=-1)`, computed in two passes.

    On a CPU, `amax` is much faster than `max`, which also finds the index.
    """
    vocab_size = logits_NV.shape[1]
    num_blocks = vocab_size // BLOCK
    tail = num_blocks * BLOCK
    best_NB = logits_NV[:, :tail].view(len(logits_NV), num_blocks, BLOCK).amax(dim=-1)
    if tail < vocab_size:
        best_NB = torch.cat((best_NB, logits_NV[:, tail:].amax(dim=-1, keepdim=True)), dim=1)
    best_N1, block_N1 = best_NB.max(dim=-1, keepdim=True)
    tokens_NW = block_N1 * BLOCK + torch.arange(BLOCK, device=logits_NV.device)
    tokens_NW.clamp_(max=vocab_size - 1)
    within_N1 = logits_NV.gather(1, tokens_NW).argmax(dim=-1, keepdim=True)
    return best_N1[:, 0], tokens_NW.gather(1, within_N1)[:, 0]


Choose = Callable[[Tensor, Sequence[TokenSampler]], list[int | None]]


def pick_tokens(
    logits_NV: Tensor, samplers: Sequence[TokenSampler], choose: Choose = choose_tokens
) -> list[SampledToken]:
    """Returns one sampled token per row of float32 logits.

    The token of a row does not depend on the other rows. Rows must not share memory, because
    processors change logits in place. The logits are restored for log-probabilities.
    """
    changed = process_logits(logits_NV, [sampler.processor for sampler in samplers])
    has_logprobs = any(c.num_logprobs is not None for c in samplers)
    constraints = [sampler.constraint for sampler in samplers]
    masked = mask_logits(logits_NV, constraints, keeps_logits=has_logprobs)
    tokens = choose(logits_NV, samplers)
    if masked is not None:
        masked.put_back(logits_NV)
        tokens = [
            None if c is not None and c.fault is not None else token
            for token, c in zip(tokens, constraints, strict=True)
        ]
    if changed is not None:
        changed.put_back(logits_NV)
    picks = [SampledToken(token) for token in tokens]
    logprobs: dict[int, Tensor] = {}
    open_constraints = []
    for row, (token, sampler) in enumerate(zip(tokens, samplers, strict=True)):
        if token is None:
            continue
        if sampler.processor is not None:
            sampler.processor.record(token)
        if sampler.constraint is not None:
            sampler.constraint.record(token)
            if token not in sampler.constraint.vocabulary.end_ids:
                open_constraints.append(sampler.constraint)
        if sampler.num_logprobs is not None:
            logprobs[row] = _logprobs_of(logits_NV[row], token, sampler.num_logprobs)
    compute_ahead(open_constraints)
    for row, (logprob, top) in zip(logprobs, _read_logprobs(list(logprobs.values())), strict=True):
        picks[row] = SampledToken(tokens[row], logprob, top)
    return picks


def _draw_from_all(logits_NV: Tensor, rows_P: Tensor, samplers: Sequence[TokenSampler]) -> Tensor:
    """Draws a token for these rows by inverse transform sampling.

    It takes two passes: first the block is drawn, then the token within it.
    """
    logits_PV, device = logits_NV.index_select(0, rows_P), logits_NV.device
    temperature_P1 = to_device(torch.tensor([[c.temperature] for c in samplers]), device)
    weights_PV = logits_PV.sub_(logits_PV.amax(-1, keepdim=True)).div_(temperature_P1).exp_()
    if any(c.min_p for c in samplers):
        min_p_P1 = to_device(torch.tensor([[c.min_p] for c in samplers]), device)
        weights_PV.masked_fill_(weights_PV < min_p_P1, 0.0)  # the best token has weight 1
    padding = -weights_PV.shape[1] % BLOCK
    weights_PBW = torch.nn.functional.pad(weights_PV, (0, padding)).view(len(samplers), -1, BLOCK)
    mass_PB = weights_PBW.sum(-1).double().cumsum(-1)
    target_P1 = to_device(_uniform(samplers), device) * mass_PB[:, -1:]
    block_P1 = _first_over(mass_PB, target_P1)
    before_P1 = torch.where(block_P1 > 0, mass_PB.gather(1, (block_P1 - 1).clamp(min=0)), 0.0)
    rows_P = torch.arange(len(samplers), device=device)
    mass_PW = weights_PBW[rows_P, block_P1[:, 0]].double().cumsum(-1)
    within_P1 = _first_over(mass_PW, target_P1 - before_P1)
    return (block_P1 * BLOCK + within_P1)[:, 0]


def _draw_from_best(logits_NV: Tensor, rows_R: Tensor, samplers: Sequence[TokenSampler]) -> Tensor:
    """Draws a token for these rows, which have `top_k` or `top_p`."""
    if logits_NV.device.type != "cpu":
        return draw_from_sorted(logits_NV.index_select(0, rows_R), samplers)
    tokens = []
    for row, sampler in zip(rows_R.tolist(), samplers, strict=True):
        tokens_K, mass_K = _best(logits_NV[row], sampler)
        target_11 = _uniform([sampler]) * mass_K[-1]
        tokens.append(tokens_K[_first_over(mass_K[None], target_11)].view(()))
    return torch.stack(tokens)


def draw_from_sorted(logits_RV: Tensor, samplers: Sequence[TokenSampler]) -> Tensor:
    """Draws as from `_best`, but for all rows at once, so that the host need not wait for a GPU.

    All tokens are sorted, unless every row has `top_k`: whether NUM_CANDIDATES suffice could only
    be seen by a wait. Up to rounding, the result is the same.
    """
    device, vocab_size = logits_RV.device, logits_RV.shape[1]
    ks = [min(c.top_k or vocab_size, vocab_size) for c in samplers]
    parameters = [[c.temperature, c.top_p, math.log(c.min_p or 1e-300)] for c in samplers]
    # [3, R, 1], so that each part is contiguous
    parameters_3R1 = torch.tensor(parameters, dtype=torch.float64).t().contiguous()[:, :, None]
    temperature_R1, top_p_R1, log_min_p_R1 = to_device(parameters_3R1, device).unbind(0)
    k_R1 = to_device(torch.tensor(ks), device)[:, None]
    values_RC, tokens_RC = (logits_RV / temperature_R1.float()).topk(max(ks))
    is_outside_RC = torch.arange(max(ks), device=device) >= k_R1
    values_RC = values_RC.masked_fill(is_outside_RC, -torch.inf)
    mass_RC = (values_RC - values_RC.logsumexp(-1, keepdim=True)).exp().double().cumsum(-1)
    num_R1 = torch.searchsorted(mass_RC, top_p_R1) + 1  # the best token always stays
    is_probable_RC = values_RC - values_RC[:, :1] >= log_min_p_R1
    num_R1 = torch.minimum(num_R1, is_probable_RC.sum(-1, keepdim=True)).clamp(1, max(ks))
    total_R1 = mass_RC.gather(1, num_R1 - 1)
    # the same as `_first_over`, within the tokens that are kept
    place_R1 = torch.minimum(
        torch.searchsorted(mass_RC, to_device(_uniform(samplers), device) * total_R1, right=True),
        torch.searchsorted(mass_RC, total_R1),
    ).clamp(max=max(ks) - 1)
    return tokens_RC.gather(1, place_R1)[:, 0]


def _best(logits_V: Tensor, sampler: TokenSampler) -> tuple[Tensor, Tensor]:
    """Returns the tokens that may be drawn, best first, and their cumulative mass [K]."""
    scaled_V = logits_V / sampler.temperature
    values_C, tokens_C = scaled_V.topk(min(sampler.top_k or NUM_CANDIDATES, len(scaled_V)))
    if not sampler.top_k and (values_C - scaled_V.logsumexp(0)).exp().sum() < sampler.top_p:
        values_C, tokens_C = scaled_V.sort(descending=True)
    # normalised over all tokens, or over those that top_k kept
    whole = values_C.logsumexp(0) if sampler.top_k else scaled_V.logsumexp(0)
    mass_C = (values_C - whole).exp().double().cumsum(0)
    num_kept = int(torch.searchsorted(mass_C, sampler.top_p)) + 1  # the best token always stays
    if sampler.min_p:
        num_kept = min(num_kept, int((values_C - values_C[0] >= math.log(sampler.min_p)).sum()))
    return tokens_C[:num_kept], mass_C[:num_kept]


def probabilities(logits_V: Tensor, sampler: TokenSampler) -> Tensor:
    """Returns the float64 distribution of a sampled row, given its processed logits."""
    if sampler.is_ranked:
        tokens_K, mass_K = _best(logits_V, sampler)
        kept_K = mass_K.diff(prepend=mass_K.new_zeros(1)) / mass_K[-1]
        return logits_V.new_zeros(len(logits_V), dtype=torch.float64).scatter_(0, tokens_K, kept_K)
    weights_V = ((logits_V - logits_V.max()) / sampler.temperature).double().exp_()
    weights_V.masked_fill_(weights_V < sampler.min_p, 0.0)
    return weights_V.div_(weights_V.sum())


def draw(weights_V: Tensor, sampler: TokenSampler) -> int:
    """Draws a token in proportion to its weight, with the generator of the row."""
    mass_1V = weights_V.cumsum(0)[None]
    return int(_first_over(mass_1V, _uniform([sampler]).to(mass_1V.device) * mass_1V[:, -1:]))


def uniform(sampler: TokenSampler) -> float:
    """Returns the next random number in [0, 1) from the generator of the row."""
    return float(_uniform([sampler]))


def _uniform(samplers: Sequence[TokenSampler]) -> Tensor:
    return torch.cat(
        [torch.rand(1, 1, generator=c.generator, dtype=torch.float64) for c in samplers]
    )


def _first_over(mass_RC: Tensor, target_R1: Tensor) -> Tensor:
    """Returns the first column of each row whose cumulative mass exceeds the target.

    It is never a column without mass, even if the target is 0.
    """
    # the last column that has mass; NaNs would give a column after the last one
    last_R1 = torch.searchsorted(mass_RC, mass_RC[:, -1:].contiguous())
    found_R1 = torch.minimum(torch.searchsorted(mass_RC, target_R1, right=True), last_R1)
    return found_R1.clamp_(max=mass_RC.shape[1] - 1)


def _logprobs_of(logits_V: Tensor, token: int, num_top: int) -> Tensor:
    """Returns the log-probability of the token, then those of the best tokens, then these tokens."""
    logprobs_V = logits_V.log_softmax(dim=-1)
    values, tokens = logprobs_V.topk(min(num_top, logprobs_V.shape[-1]))
    # float64 holds all tokens and all float32 values exactly
    return torch.cat((logprobs_V[token : token + 1].double(), values.double(), tokens.double()))


def _read_logprobs(rows: Sequence[Tensor]) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """Returns the results of `_logprobs_of` as numbers. The host waits for a GPU once."""
    numbers = iter(torch.cat(list(rows)).cpu().tolist() if rows else ())
    found = []
    for row in rows:
        num_top = len(row) // 2
        logprob, *others = islice(numbers, len(row))
        tokens = [int(token) for token in others[num_top:]]
        found.append((logprob, tuple(zip(tokens, others[:num_top], strict=True))))
    return found
