"""What a student is worth: on held-out rows token by token, and by the answers it gives.

The held-out rows' targets are those of the data (the teacher's answers, or the data set's own completions).
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

from worker.distill.batches import Batch, collate, cut_batches
from worker.distill.data import Example
from worker.distill.fused import RowStats, fused_distillation_loss
from worker.distill.heads import Head
from worker.distill.objectives import TokenObjective
from worker.distill.sampler import Sampler
from worker.distill.students import body_of, num_parameters
from worker.distill.teachers import CachedTeacher

NUM_ANSWERED = 48  # held-out prompts that are answered for ROUGE-L and the samples
NUM_TIMED = 8  # of those, the batch whose speed is measured
TIMED_TOKENS = 96


@dataclass(frozen=True)
class HeldOut:
    """Means over held-out targets, in nats where they are logarithms; agreement is with the teacher's first choice."""

    num_targets: int
    loss: float
    kl: float
    cross_entropy: float
    agreement: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.cross_entropy, 700.0))  # an untrained student must not overflow the report

    def series(self) -> dict[str, float]:
        """As metrics of a step."""
        return {
            "valid_loss": self.loss,
            "valid_kl": self.kl,
            "valid_perplexity": self.perplexity,
            "valid_agreement": self.agreement,
        }


class HeldOutRows:
    """The held-out rows in fixed batches; their numbers in the teacher's cache begin at `first_index`."""

    def __init__(
        self, examples: Sequence[Example], *, first_index: int, batch_tokens: int, device: str
    ) -> None:
        self.examples = examples
        self.first_index = first_index
        self.device = device
        lengths = [len(example.token_ids) for example in examples]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        self.batches = cut_batches(order, lengths, batch_tokens)

    @torch.no_grad()
    def measure(
        self,
        model: PreTrainedModel,
        head: Head,
        teacher: CachedTeacher,
        objective: TokenObjective,
        on_batch: Callable[[], None] = lambda: None,
    ) -> HeldOut:
        """Teacher-forced, so every model sees the same prefixes."""
        total = RowStats.zero()
        for numbers in self.batches:
            batch = collate(self.examples, numbers, self.device)
            teacher_rows = teacher.rows(
                [self.first_index + i for i in numbers],
                batch.input_ids_BT,
                batch.attention_mask_BT,
                batch.keep_BT,
            )
            hidden_NH = hidden_rows(model, batch)
            _, stats = fused_distillation_loss(
                hidden_NH, head, batch.targets_N, teacher_rows, objective, denominator=1.0
            )
            total = total + stats
            on_batch()
        n = total.num_rows
        loss, kl = (
            max(0.0, value / n) for value in (total.loss_sum, total.kl_sum)
        )  # rounding may pass below 0
        return HeldOut(n, loss, kl, total.ce_sum / n, total.num_agreeing / n)


def hidden_rows(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The model's last hidden states where it predicts targets, [N, H]."""
    hidden_NH: Tensor = body_of(model)(input_ids=batch.input_ids_BT, use_cache=False).last_hidden_state[
        batch.keep_BT
    ]
    return hidden_NH


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


def _decode(sampler: Sampler, prompts: Sequence[Sequence[int]], *, num_tokens: int) -> tuple[int, float]:
    begun = time.perf_counter()
    made = sampler.generate(prompts, max_new_tokens=num_tokens, temperature=0.0, ignore_end=True)
    return sum(len(answer.tokens) for answer in made), time.perf_counter() - begun


class _Words:
    """The scorer's own tokenizer knows a-z only."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean F-measure of the longest common subsequences of words; two empty texts agree."""
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    scores = [
        1.0
        if not reference.strip() and not answer.strip()
        else float(scorer.score(reference, answer)["rougeL"].fmeasure)
        for answer, reference in zip(answers, references, strict=True)
    ]
    return sum(scores) / max(1, len(scores))


def size_of(model: PreTrainedModel) -> dict[str, float]:
    """Layers, parameters and bytes of the weights in the precision they are served in here."""
    return {
        "num_layers": int(model.config.num_hidden_layers),
        "num_parameters": num_parameters(model),
        "weights_bytes": sum(parameter.nbytes for parameter in model.parameters()),
    }
