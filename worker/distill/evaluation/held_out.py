"""What a student is worth: on held-out rows token by token, and by the answers it gives.

The held-out rows' targets are those of the data (the teacher's answers, or the data set's own completions).
N targets of a batch, R held-out rows.
"""

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor
from transformers import PreTrainedModel

from worker.distill.data.batching import Batch, collate, cut_batches
from worker.distill.data.rows import Example
from worker.distill.data.sampler import Sampler
from worker.distill.data_parallel import ALONE, Ranks
from worker.distill.forward.hidden_states import hidden_rows_alone
from worker.distill.losses.divergences import TokenObjective
from worker.distill.losses.fused_loss import RowStats, fused_distillation_loss
from worker.distill.losses.lm_head import Head
from worker.distill.students.recipe import num_parameters
from worker.distill.teachers.cached_teacher import CachedTeacher
from worker.models.architectures import layer_counts

NUM_ANSWERED = 48  # held-out prompts that are answered for ROUGE-L and the samples
NUM_TIMED = 8  # of those, the batch whose speed is measured
TIMED_TOKENS = 96


@dataclass(frozen=True)
class HeldOut:
    """Means over held-out targets, in nats where they are logarithms; agreement is with the teacher's first choice.

    sums_R4 has each row's sums of loss, KL, cross-entropy and agreement over its targets_R targets.
    """

    sums_R4: Tensor
    targets_R: Tensor
    has_teacher: bool = True  # without one over the same vocabulary, KL and agreement mean nothing

    @property
    def num_targets(self) -> int:
        return int(self.targets_R.sum())

    @property
    def loss(self) -> float:
        return self._mean(0)

    @property
    def kl(self) -> float:
        return self._mean(1)

    @property
    def cross_entropy(self) -> float:
        return self._mean(2)

    @property
    def agreement(self) -> float:
        return self._mean(3)

    def _mean(self, column: int) -> float:
        return float(self.sums_R4[:, column].sum()) / self.num_targets

    @property
    def perplexity(self) -> float:
        return math.exp(
            min(self.cross_entropy, 700.0)
        )  # an untrained student must not overflow the report

    def series(self) -> dict[str, float]:
        """As metrics of a step."""
        series = {"valid_loss": self.loss, "valid_perplexity": self.perplexity}
        return series | (
            {"valid_kl": self.kl, "valid_agreement": self.agreement} if self.has_teacher else {}
        )


class HeldOutRows:
    """The held-out rows in fixed batches; their numbers in the teacher's cache begin at `first_index`."""

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        first_index: int,
        batch_tokens: int,
        device: str,
        ranks: Ranks = ALONE,
    ) -> None:
        """With several ranks each takes some of the batches, and all get the same figures."""
        self.examples = examples
        self.first_index = first_index
        self.batch_tokens = batch_tokens
        self.device = device
        self.ranks = ranks
        lengths = [example.num_tokens for example in examples]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        self.batches = cut_batches(order, lengths, batch_tokens)

    def measure(
        self,
        model: PreTrainedModel,
        head: Head,
        teacher: CachedTeacher | None,
        objective: TokenObjective,
        on_batch: Callable[[], None] = lambda: None,
    ) -> HeldOut:
        """Measures a model under teacher forcing, so that every model sees the same prefixes.

        Without a teacher there is cross-entropy alone. The loss is computed on the head's device and in its dtype,
        whatever those of the model are.
        """

        def measure_batch(batch: Batch) -> RowStats:
            numbers = [self.first_index + i for i in batch.indices]
            rows = None if teacher is None else teacher.rows(numbers)
            hidden_NH = hidden_rows_alone(model, batch).to(head.weight_VH)
            targets_N = batch.targets_N.to(head.weight_VH.device)
            _, stats = fused_distillation_loss(
                hidden_NH, head, targets_N, rows, objective, denominator=1.0, keeps_rows=True
            )
            on_batch()
            return stats

        return self._sum(
            measure_batch, has_teacher=teacher is not None and objective.matches == "token"
        )

    def measure_teacher(self, teacher: CachedTeacher, objective: TokenObjective) -> HeldOut:
        """The teacher by its own rows: of a masked one, which sees what follows, there is nothing else to measure."""

        def measure_batch(batch: Batch) -> RowStats:
            rows = teacher.rows([self.first_index + i for i in batch.indices])
            assert rows.hidden_NH is not None
            targets_N = batch.targets_N.to(rows.hidden_NH.device)
            _, stats = fused_distillation_loss(
                rows.hidden_NH,
                rows.head,
                targets_N,
                rows,
                objective,
                denominator=1.0,
                keeps_rows=True,
            )
            return stats

        return self._sum(measure_batch, has_teacher=True)

    @torch.no_grad()
    def _sum(self, measure_batch: Callable[[Batch], RowStats], *, has_teacher: bool) -> HeldOut:
        sums_R4 = torch.zeros(len(self.examples), 4, dtype=torch.float64)
        targets_R = torch.tensor([example.num_targets for example in self.examples])
        for numbers in self.batches[self.ranks.number :: self.ranks.count]:
            stats = measure_batch(collate(self.examples, numbers, self.device))
            assert stats.rows_N4 is not None
            row_of_N = torch.tensor(numbers).repeat_interleave(targets_R[numbers])
            sums_R4.index_add_(0, row_of_N, stats.rows_N4.cpu())
        self.ranks.sum_tensor(sums_R4)
        return HeldOut(sums_R4.clamp_(min=0.0), targets_R, has_teacher)  # rounding may pass below 0


@dataclass(frozen=True)
class Speed:
    """Greedy decoding in tokens a second: one prompt at a time, and all together."""

    alone: float
    batched: float
    num_batched: int


def measure_speed(sampler: Sampler, prompts: Sequence[Sequence[int]]) -> Speed:
    """The first prompts, as serving would decode them, prefill included.

    Every model makes the same number of tokens, or one that ends early would decode smaller batches than one that rambles.
    """
    timed = prompts[:NUM_TIMED]
    _decode(sampler, timed, num_tokens=2)  # the first call of all warms up
    alone, took_alone = _decode(sampler, timed[:1], num_tokens=TIMED_TOKENS)
    batched, took_batched = _decode(sampler, timed, num_tokens=TIMED_TOKENS)
    return Speed(alone / took_alone, batched / took_batched, len(timed))


def _decode(
    sampler: Sampler, prompts: Sequence[Sequence[int]], *, num_tokens: int
) -> tuple[int, float]:
    begun = time.perf_counter()
    made = sampler.generate(prompts, max_new_tokens=num_tokens, temperature=0.0, ignore_end=True)
    return sum(len(answer.tokens) for answer in made), time.perf_counter() - begun


class _Words:
    """The scorer's own tokenizer knows a-z only."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """F-measure of the longest common subsequence of words, a pair; two empty texts agree."""
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return [
        1.0
        if not reference.strip() and not answer.strip()
        else float(scorer.score(reference, answer)["rougeL"].fmeasure)
        for answer, reference in zip(answers, references, strict=True)
    ]


def size_of(model: PreTrainedModel) -> dict[str, float]:
    """Layers, parameters and bytes of the weights in the precision they are served in here.

    Of an encoder-decoder num_layers are the decoder's, and the encoder's stand beside them.
    """
    num_encoder_layers, num_layers = layer_counts(model.config)
    return {
        "num_layers": num_layers,
        **({"num_encoder_layers": num_encoder_layers} if num_encoder_layers else {}),
        "num_parameters": num_parameters(model),
        "weights_bytes": sum(parameter.nbytes for parameter in model.parameters()),
    }
