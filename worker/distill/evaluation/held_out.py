"""Measures a model on the held-out rows: losses per token, decoding speed, answers, and size.

The targets are those of the data: the teacher's answers, or the data set's own completions.

N targets of a batch, R held-out rows.
"""

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor
from transformers import PreTrainedModel

from app.contracts.batch_plan import cut_batches
from app.contracts.distillation import EarlyStopping
from app.contracts.run_limits import NUM_TIMED, TIMED_TOKENS, WARM_UP_TOKENS
from worker.distill.data.batching import Batch, collate
from worker.distill.data.rows import Example
from worker.distill.data.sampler import Sampler
from worker.distill.data_parallel import ALONE, Ranks
from worker.distill.forward.hidden_states import autocast, hidden_rows_alone
from worker.distill.losses.divergences import TokenObjective
from worker.distill.losses.fused_loss import RowStats, fused_distillation_loss
from worker.distill.losses.lm_head import Head
from worker.distill.students.recipe import num_parameters
from worker.distill.teachers.cached_teacher import CachedTeacher
from worker.distill.teachers.quantized import stored_bytes
from worker.distill.teachers.signals import Signal
from worker.models.architectures import layer_counts


@dataclass(frozen=True)
class HeldOut:
    """Means over held-out targets. Loss, KL and cross-entropy are in nats.

    `agreement` is the share of targets at which student and teacher have the same most likely
    token. `token_accuracy` is the share at which the target is the model's most likely token.
    `sums_R4` has each row's sums of loss, KL, cross-entropy and agreement (or accuracy) over its
    `targets_R` targets.
    """

    sums_R4: Tensor
    targets_R: Tensor
    has_teacher: bool = True  # KL and agreement need a teacher with the same vocabulary
    has_accuracy: bool = False  # the last column is the accuracy: there was no teacher at all

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

    @property
    def token_accuracy(self) -> float:
        return self._mean(3)

    def _mean(self, column: int) -> float:
        return float(self.sums_R4[:, column].sum()) / self.num_targets

    @property
    def perplexity(self) -> float:
        # capped, so that an untrained student does not overflow the report
        return math.exp(min(self.cross_entropy, 700.0))

    def series(self) -> dict[str, float]:
        """Returns the metrics of an evaluation during the training, by name."""
        series = {"valid_loss": self.loss, "valid_perplexity": self.perplexity}
        if self.has_accuracy:
            series["valid_mean_token_accuracy"] = self.token_accuracy
        return series | (
            {"valid_kl": self.kl, "valid_agreement": self.agreement} if self.has_teacher else {}
        )


def stopping_score(held_out: HeldOut, early: EarlyStopping | None, signal: Signal) -> float:
    """Returns the held-out score for early stopping and the best student. Lower is better."""
    wanted = early.metric if early else "perplexity" if signal.name in ("hidden", "text") else "kl"
    match wanted if held_out.has_teacher else "perplexity":
        case "kl":
            return held_out.kl
        case "perplexity":
            return held_out.cross_entropy
        case "agreement":
            return -held_out.agreement


class HeldOutRows:
    """The held-out rows in fixed batches. They begin at `first_index` in the teacher's cache."""

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        first_index: int,
        batch_tokens: int,
        device: str,
        autocast: torch.dtype | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Splits the rows into batches. Each rank measures some of them, and all get the sums.

        `autocast` is the dtype in which the models' layers run, as in training. None leaves them in
        the dtype of their weights.
        """
        self.examples = examples
        self.first_index = first_index
        self.batch_tokens = batch_tokens
        self.device = device
        self.autocast = autocast
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

        Without a teacher there are only the cross-entropy and the token accuracy. The loss is
        computed on the LM head's device and in its dtype, which may differ from the model's.
        """

        def measure_batch(batch: Batch) -> RowStats:
            """Returns the statistics of one batch."""
            numbers = [self.first_index + i for i in batch.indices]
            rows = None if teacher is None else teacher.rows(numbers)
            with autocast(self.device, self.autocast):
                hidden_NH = hidden_rows_alone(model, batch)
            hidden_NH = hidden_NH.to(head.weight_VH)
            targets_N = batch.targets_N.to(head.weight_VH.device)
            _, stats = fused_distillation_loss(
                hidden_NH, head, targets_N, rows, objective, denominator=1.0, keeps_rows=True
            )
            on_batch()
            return stats

        measured = self._sum(
            measure_batch, has_teacher=teacher is not None and objective.matches == "token"
        )
        return replace(measured, has_accuracy=teacher is None)

    def measure_teacher(self, teacher: CachedTeacher, objective: TokenObjective) -> HeldOut:
        """Measures a masked teacher by its own cached rows.

        A masked model sees the tokens after a target, so it has no next-token distribution to
        measure.
        """

        def measure_batch(batch: Batch) -> RowStats:
            """Returns the statistics of one batch."""
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
        batches = self.batches[self.ranks.number :: self.ranks.count]
        measured = []
        for numbers in batches:
            stats = measure_batch(collate(self.examples, numbers, self.device))
            assert stats.rows_N4 is not None
            measured.append(stats.rows_N4)
        if measured:  # read once: each read waits for the GPU
            order_R = torch.tensor([number for numbers in batches for number in numbers])
            rows_N4 = torch.cat(measured).cpu()
            row_of_N = order_R.repeat_interleave(targets_R[order_R], output_size=len(rows_N4))
            sums_R4.index_add_(0, row_of_N, rows_N4)
        self.ranks.sum_tensor(sums_R4)
        # rounding errors may be negative
        return HeldOut(sums_R4.clamp_(min=0.0), targets_R, has_teacher)


@dataclass(frozen=True)
class Speed:
    """Greedy decoding speed in tokens per second, for one prompt alone and for a batch."""

    alone: float
    batched: float
    num_batched: int


def measure_speed(sampler: Sampler, prompts: Sequence[Sequence[int]]) -> Speed:
    """Measures the decoding of the first prompts, including prefill, as in serving.

    Every model generates the same number of tokens. Otherwise a model that ends early would decode
    smaller batches.
    """
    timed = prompts[:NUM_TIMED]
    _decode(sampler, timed, num_tokens=WARM_UP_TOKENS)
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
    """Tokenizer for ROUGE that keeps words of all languages. The scorer's own keeps only a-z."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """Returns the ROUGE-L F-measure of each answer, over words. Two empty texts score 1."""
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return [
        1.0
        if not reference.strip() and not answer.strip()
        else float(scorer.score(reference, answer)["rougeL"].fmeasure)
        for answer, reference in zip(answers, references, strict=True)
    ]


def size_of(model: PreTrainedModel) -> dict[str, float]:
    """Returns the number of layers and parameters, and the bytes of the weights as they are loaded.

    For an encoder-decoder, `num_layers` counts the decoder's layers, and `num_encoder_layers` the
    encoder's.
    """
    num_encoder_layers, num_layers = layer_counts(model.config)
    return {
        "num_layers": num_layers,
        **({"num_encoder_layers": num_encoder_layers} if num_encoder_layers else {}),
        "num_parameters": num_parameters(model),
        "weights_bytes": sum(stored_bytes(parameter) for parameter in model.parameters()),
    }
