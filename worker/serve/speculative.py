"""Exact speculative decoding: a draft model proposes tokens that the model verifies in one call.

The output distribution is that of the model alone. A greedy row accepts a proposal if it equals the
best token of the model. For a sampled row, let p be the distribution of the model and q that of the
draft. A proposal x, drawn from q, is accepted with probability min(1, p(x) / q(x)). If it is
rejected, a token is drawn from max(p - q, 0), normalised.

Source: Leviathan et al., arXiv:2211.17192.
"""

# N rows, Q tokens per row, V vocabulary
import copy
from collections.abc import Container, Iterator
from collections.abc import Sequence as Listing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from worker.serve.decoding.cursor_batch import Steps
from worker.serve.decoding.decoder import Decoder, Sequence
from worker.serve.decoding.families import family_of
from worker.serve.decoding.sampling import (
    SampledToken,
    TokenSampler,
    choose_tokens,
    draw,
    pick_tokens,
    probabilities,
    uniform,
)
from worker.serve.decoding.speculative_batch import LookaheadBatch
from worker.serve.engine import TransformersEngine
from worker.serve.errors import DraftUnsupported
from worker.serve.loading import LoadedModel

MAX_DRAFTING = 1  # largest batch with a draft; in larger ones a draft is slower (bench/LOG.md)
MIN_CONFIDENCE = 0.4  # least probability of the draft's best token that is worth verifying
GREEDY = TokenSampler()


@dataclass
class DraftCounts:
    """Counters of proposals and their results. A round is one verification of one row.

    Proposals after the end of an answer are not counted, because they are not verified.
    """

    num_rounds: int = 0
    num_proposed: int = 0
    num_accepted: int = 0
    num_tokens: int = 0  # accepted proposals, and the model's own token after them

    @property
    def acceptance_rate(self) -> float:
        return self.num_accepted / max(1, self.num_proposed)

    @property
    def mean_accepted(self) -> float:
        """Accepted proposals per round."""
        return self.num_accepted / max(1, self.num_rounds)

    @property
    def tokens_a_round(self) -> float:
        return self.num_tokens / max(1, self.num_rounds)


@dataclass(frozen=True)
class Proposal:
    """A token of the draft. In a sampled row, with the distribution from which it was drawn."""

    token: int
    drawn_from_V: Tensor | None = None


Offers = dict[int, Proposal]  # by row number


class SpeculativeDecoder(Decoder):
    """Decoder whose steps either prefill new sequences or verify several tokens of every sequence.

    With more than `max_drafting` sequences it runs plain decode steps, unless a sampled sequence
    has a seed. The draft determines which random number is used for which token. A seeded sequence
    therefore always uses the draft, or its text would depend on the other sequences in the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        draft: nn.Module,
        num_draft_tokens: int,
        max_running: int,
        max_context_tokens: int,
        max_drafting: int = MAX_DRAFTING,
        min_confidence: float = MIN_CONFIDENCE,
        steps: Steps = "auto",
    ) -> None:
        width = max_context_tokens + num_draft_tokens
        self.target = LookaheadBatch(model, max_rows=max_running, max_width=width, steps=steps)
        super().__init__(
            model, max_running=max_running, max_context_tokens=max_context_tokens, batch=self.target
        )
        # Row i of the draft is row i of the target. Sequences that joined since the last round
        # have no row in the draft yet. The next round adds them.
        self.draft = LookaheadBatch(draft, max_rows=max_running, max_width=width, steps="plain")
        self.num_draft_tokens = num_draft_tokens
        self.max_drafting = max_drafting
        self.min_confidence = min_confidence
        self.counts = DraftCounts()

    @property
    def cache_bytes(self) -> int:
        return self.target.cache_bytes + self.draft.cache_bytes

    def free_cache(self) -> None:
        if not self._rows:
            self.draft.free()
        super().free_cache()

    def recover(self) -> list[Sequence]:
        self.draft.truncate(0)
        return super().recover()

    def step(self) -> Iterator[tuple[Sequence, SampledToken]]:
        """Returns the new tokens of each sequence, one by one.

        The tokens of a sequence that is dropped during the iteration are left out.
        """
        is_joining = self.num_waiting and len(self._rows) < self.max_running and self._may_join()
        if self._rows and not is_joining:
            if self._is_drafting():
                return self._taken(self._round())
            self._forget_draft()
        return iter(super().step())

    def _is_drafting(self) -> bool:
        samplers = [sequence.sampler for sequence in self._rows]
        return len(self._rows) <= self.max_drafting or any(
            c.has_seed and not c.is_greedy for c in samplers
        )

    def _round(self) -> list[tuple[Sequence, list[SampledToken]]]:
        self._has_prefilled = False
        self._choosing = sequences = list(self._rows)
        for sequence in sequences[self.draft.num_rows :]:
            self.draft.join([[*sequence.prompt, *sequence.tokens[:-1]]])
        for batch in (self.target, self.draft):
            # the draft reads one token less, but its cursor may advance as far
            batch.make_room_for(self.num_draft_tokens + 1)
        proposals = self._propose(sequences)
        rows = [
            [
                sequence.tokens[-1],
                *(offers[row].token if row in offers else 0 for offers in proposals),
            ]
            for row, sequence in enumerate(sequences)
        ]
        logits = self.target.forward(rows, offset=0, num_logits=len(rows[0]))
        runs = self._verify(sequences, proposals, logits.view(len(rows), len(rows[0]), -1))
        for batch in (self.target, self.draft):
            batch.keep([len(run) for run in runs])
        self._choosing = []
        return list(zip(sequences, runs, strict=True))

    def _propose(self, sequences: Listing[Sequence]) -> list[Offers]:
        """Returns the proposals of each position, by row.

        A row gets no more proposals once the draft is unsure.
        """
        # Processors and constraints are copied: only tokens that the model accepts may change their
        # state.
        samplers = [
            replace(
                s.sampler,
                num_logprobs=None,
                processor=copy.deepcopy(s.sampler.processor),
                constraint=copy.deepcopy(s.sampler.constraint),
            )
            for s in sequences
        ]
        # The draft reads the last two tokens. After a round that accepted all proposals, it has not
        # read the first of them yet.
        rows, offset = [[([*s.prompt[-1:], *s.tokens])[-2], s.tokens[-1]] for s in sequences], -1
        proposals: list[Offers] = []
        while len(proposals) < self.num_draft_tokens:
            for row, sequence in enumerate(sequences):
                if len(sequence.tokens) + len(proposals) >= sequence.max_tokens:
                    # a processor has no room for tokens beyond max_tokens
                    samplers[row] = replace(samplers[row], processor=None)
            offers: Offers = {}
            may_offer = proposals[-1].keys() if proposals else range(len(rows))
            choose = partial(self._draft_tokens, may_offer=may_offer, offers=offers)
            picks = pick_tokens(self.draft.forward(rows, offset=offset), samplers, choose)
            for row, pick in enumerate(picks):
                if pick.token is None:
                    self.draft.cache.wipe_row(row)  # a bad draft costs time only
            if not offers:
                break
            proposals.append(offers)
            rows, offset = [[pick.token or 0] for pick in picks], len(proposals)
        return proposals

    def _draft_tokens(
        self,
        logits_NV: Tensor,
        samplers: Listing[TokenSampler],
        *,
        may_offer: Container[int],
        offers: Offers,
    ) -> list[int | None]:
        """Returns the draft's tokens, and adds those of which it is sure enough to `offers`.

        For a sampled row the confidence must not depend on the drawn token, or q would be another
        distribution.
        """
        tokens = choose_tokens(logits_NV, [GREEDY] * len(samplers))
        confidence_N = (logits_NV.amax(dim=-1) - logits_NV.logsumexp(dim=-1)).exp().tolist()
        for row, (token, sampler) in enumerate(zip(tokens, samplers, strict=True)):
            if token is None or row not in may_offer:
                continue
            share_V, confidence = None, confidence_N[row]
            if not sampler.is_greedy:
                share_V = probabilities(logits_NV[row], sampler)
                confidence = float(share_V.max())
            if confidence >= self.min_confidence:
                tokens[row] = token if share_V is None else draw(share_V, sampler)
                offers[row] = Proposal(tokens[row] or 0, share_V)
        return tokens

    def _verify(
        self, sequences: Listing[Sequence], proposals: Listing[Offers], logits_NQV: Tensor
    ) -> list[list[SampledToken]]:
        """Returns the accepted proposals of each row, followed by the model's own next token.

        The tokens of a row end with the end of its answer.
        """
        runs: list[list[SampledToken]] = [[] for _ in sequences]
        num_accepted = [0] * len(sequences)
        open_rows = list(range(len(sequences)))
        for position, offers in enumerate([*proposals, {}]):
            samplers = [sequences[row].sampler for row in open_rows]
            choose = partial(_judge, offers=[offers.get(row) for row in open_rows])
            picks = pick_tokens(logits_NQV[open_rows, position], samplers, choose)
            still_open = []
            for row, pick in zip(open_rows, picks, strict=True):
                runs[row].append(pick)
                if row in offers and offers[row].token == pick.token:
                    num_accepted[row] += 1
                    if not _has_ended(sequences[row], runs[row]):
                        still_open.append(row)
            open_rows = still_open
            if not open_rows:
                break
        for row, sequence in enumerate(sequences):
            num_offered = sum(row in offers for offers in proposals)
            self._count(sequence, runs[row], num_offered, num_accepted[row])
        return runs

    def _count(
        self, sequence: Sequence, run: list[SampledToken], num_offered: int, num_accepted: int
    ) -> None:
        num_judged = min(num_offered, sequence.max_tokens - len(sequence.tokens))
        self.counts.num_rounds += 1
        self.counts.num_proposed += num_accepted if num_accepted == len(run) else num_judged
        self.counts.num_accepted += num_accepted
        self.counts.num_tokens += len(run)

    def _taken(
        self, runs: list[tuple[Sequence, list[SampledToken]]]
    ) -> Iterator[tuple[Sequence, SampledToken]]:
        for sequence, run in runs:
            for pick in run:
                if sequence in self._rows:
                    self._take(self._rows.index(sequence), pick)
                    yield sequence, pick

    def _leave(self, row: int, *, is_poisoned: bool = False) -> None:
        was_complete = self.draft.num_rows == len(self._rows)
        super()._leave(row, is_poisoned=is_poisoned)
        if was_complete:
            self.draft.leave(row)
        elif row < self.draft.num_rows:
            # the target moves its last row to this number, but the draft has no such row yet
            self._forget_draft()

    def _forget_draft(self) -> None:
        while self.draft.num_rows:
            self.draft.leave(self.draft.num_rows - 1)


def _has_ended(sequence: Sequence, run: list[SampledToken]) -> bool:
    return (
        run[-1].token in sequence.end_ids or len(sequence.tokens) + len(run) >= sequence.max_tokens
    )


def _judge(
    logits_NV: Tensor, samplers: Listing[TokenSampler], *, offers: Listing[Proposal | None]
) -> list[int | None]:
    """Returns the model's token for each row, or the proposed token if it is accepted."""
    is_ruled = [offer is not None and offer.drawn_from_V is not None for offer in offers]
    plain = [
        GREEDY if ruled else sampler for ruled, sampler in zip(is_ruled, samplers, strict=True)
    ]
    tokens = choose_tokens(logits_NV, plain)
    for row, (sampler, offer) in enumerate(zip(samplers, offers, strict=True)):
        if is_ruled[row] and offer is not None and tokens[row] is not None:
            tokens[row] = accept_or_draw(offer, probabilities(logits_NV[row], sampler), sampler)
    return tokens


def accept_or_draw(offer: Proposal, wanted_V: Tensor, sampler: TokenSampler) -> int:
    """Returns the proposed token or draws another one.

    Each token is returned with its probability in `wanted_V`.
    """
    assert offer.drawn_from_V is not None, "the distribution of a sampled row is known"
    if uniform(sampler) * float(offer.drawn_from_V[offer.token]) < float(wanted_V[offer.token]):
        return offer.token
    left_V = (wanted_V - offer.drawn_from_V).clamp(min=0.0)
    # all differences are zero if the two distributions differ by rounding only
    return draw(left_V if float(left_V.sum()) > 0 else wanted_V, sampler)


@dataclass(kw_only=True)
class SpeculativeEngine(TransformersEngine):
    """Engine that serves a decoder with a draft decoder of the same tokenizer and vocabulary.

    Greedy text equals that of the engine without a draft, except where two logits differ only by
    rounding. A step of several tokens rounds differently from a step of one token, as batches of
    different sizes do. bench/speculative.py shows the gap where two answers differ.

    A seed gives the same sampled text regardless of other requests. The text differs from that
    without a draft, and from that with another number of draft tokens.

    The draft is not used with more than `max_drafting` sequences, unless a sampled one has a seed.
    All sequences then use it. A row gets proposals while the draft gives its best token a probability of at least
    `min_confidence`.

    Raises DraftUnsupported if the two models do not match.
    """

    draft: LoadedModel
    num_draft_tokens: int = 4
    max_drafting: int = MAX_DRAFTING
    min_confidence: float = MIN_CONFIDENCE

    def __post_init__(self) -> None:
        self._refuse_unlike()
        self.draft.model.eval()
        super().__post_init__()

    @property
    def draft_counts(self) -> DraftCounts:
        return self._speculative.counts

    def _make_decoder(self) -> Decoder:
        self._speculative = SpeculativeDecoder(
            self.model,
            draft=self.draft.model,
            num_draft_tokens=self.num_draft_tokens,
            max_running=self.max_running,
            max_context_tokens=self.max_context_tokens,
            max_drafting=self.max_drafting,
            min_confidence=self.min_confidence,
            steps=self.steps,
        )
        return self._speculative

    def _refuse_unlike(self) -> None:
        if family_of(self.model).has_encoder or family_of(self.draft.model).has_encoder:
            raise DraftUnsupported(
                "only decoders can be served with a draft; serve an encoder-decoder without one"
            )
        widths = [_num_logits(model) for model in (self.model, self.draft.model)]
        if widths[0] != widths[1] or self.tokenizer.get_vocab() != self.draft.tokenizer.get_vocab():
            raise DraftUnsupported(
                "the draft must have the tokenizer and vocabulary of the model; distil a draft from the model itself"
            )


def _num_logits(model: nn.Module) -> int:
    config: Any = model.config  # transformers is untyped here
    return int(config.get_text_config(decoder=True).vocab_size)
