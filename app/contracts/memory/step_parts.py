"""GPU memory of two parts of a training step that not every job has: feature losses and rollouts.

H hidden width of the student, W that of the teacher, A relation heads.
"""

import math
from dataclasses import dataclass
from typing import Final

from app.contracts.batch_plan import DEVICE_BATCH_TOKENS
from app.contracts.distillation import AttentionTerm, Distillation, HiddenTerm
from app.contracts.model_sizes import ModelSizes
from app.contracts.run_limits import MAX_RUNNING

# Float32 values per pair of layers, position and width of the teacher that are kept.
HIDDEN_VALUES: Final = {"mse": 1, "cosine": 2}
RELATIONS: Final = 3  # among queries, among keys and among values
MAX_TOKENS: Final = 2**31
# Most tokens of a prefill (worker.serve.device_memory). It has fewer if there is less free memory.
PREFILL_TOKENS: Final = 8192


@dataclass(frozen=True)
class RolloutSizes:
    """The answers that a student generates for one step: their number, and the longest row."""

    num_sequences: int
    num_tokens: int


@dataclass(frozen=True)
class StepParts:
    """The feature losses of a job, and its rollouts, if it has any."""

    hidden: HiddenTerm | None = None
    attention: AttentionTerm | None = None
    rollouts: RolloutSizes | None = None


NO_PARTS: Final = StepParts()


def planned_parts(
    block: Distillation, *, signal: str | None = None, longest_tokens: int | None = None
) -> StepParts:
    """Returns the parts of a job's steps. The rollouts are the most that a step may have.

    signal: The teacher signal of the pair, if the job leaves it open.
    longest_tokens: Length of the longest row, if it is known.
    """
    objective, data, h = block.objective, block.data, block.hyperparameters
    hidden, attention = objective.hidden, objective.attention
    if (signal or objective.teacher_signal) == "hidden" and hidden is None and attention is None:
        hidden = HiddenTerm()
    then = objective.then.completions if objective.then else None
    if not {data.completions, then} & {"student", "replay"}:
        return StepParts(hidden, attention)
    num_tokens = min(h.max_sequence_tokens, (longest_tokens or MAX_TOKENS) + data.max_new_tokens)
    if h.batch_rows is not None:
        return StepParts(
            hidden, attention, RolloutSizes(min(h.batch_rows, MAX_RUNNING), num_tokens)
        )
    # The prompts of a batch have at most its tokens. The cache has up to twice as many rows.
    batch_tokens = DEVICE_BATCH_TOKENS if h.batch_tokens == "auto" else h.batch_tokens
    num_tokens = min(num_tokens, 2 * batch_tokens // MAX_RUNNING + data.max_new_tokens)
    return StepParts(hidden, attention, RolloutSizes(MAX_RUNNING, num_tokens))


@dataclass(frozen=True)
class FeatureBytes:
    """Memory of feature losses, in bytes per token.

    kept: What the losses keep for the backward pass.
    states: States of the teacher, from its forward pass until the losses are computed.
    work: Intermediate results of the largest loss.
    num_projections: Number of parameters of the projections between widths.
    """

    kept: int = 0
    states: int = 0
    work: int = 0
    num_projections: int = 0


NO_FEATURES: Final = FeatureBytes()


def feature_bytes(
    parts: StepParts,
    student: ModelSizes,
    teacher: ModelSizes,
    *,
    row_tokens: int,
    value_bytes: int,
) -> FeatureBytes:
    """Returns the memory of feature losses. `value_bytes` is the size of the teacher's values.

    Of an encoder-decoder, the stack with more layers counts, and all tokens pass through it.
    """
    kept = states = work = num_projections = 0
    hidden, attention = parts.hidden, parts.attention
    if hidden is not None:
        H, W = student.hidden_size, teacher.hidden_size
        most = [max(stack.num_layers for stack in model.stacks) for model in (student, teacher)]
        num_pairs = len(hidden.layer_map or ()) or most[0]
        is_projected = H != W
        kept += num_pairs * 4 * (HIDDEN_VALUES[hidden.kind] * W + H * is_projected)
        states += min(num_pairs, most[1]) * value_bytes * W
        work = 4 * (2 * W + H)
        num_projections = num_pairs * W * (H + 1) * is_projected
    if attention is not None:
        widths = [(sizes.hidden_size, sizes.kv_size, sizes.kv_size) for sizes in (student, teacher)]
        mine, theirs = (sum(each) for each in widths)
        heads = attention.num_relation_heads or math.gcd(teacher.num_heads, *widths[0], *widths[1])
        table = 4 * heads * row_tokens  # one row of a float32 relation
        kept += RELATIONS * 2 * table + 4 * mine + value_bytes * mine
        states += value_bytes * theirs
        work = max(work, 4 * table + 4 * theirs)
    return FeatureBytes(kept, states, work, num_projections)


def rollout_bytes(student: ModelSizes, rollouts: RolloutSizes | None) -> int:
    """Returns what the generation of rollouts needs beside the models, in float32.

    These are the KV cache, whose rows double when it grows, a copy of the longest prompt, and the
    results of a prefill.
    """
    if rollouts is None:
        return 0
    num_rows = min(MAX_RUNNING, 1 << (rollouts.num_sequences - 1).bit_length())
    stacks = student.stacks
    num_caches = stacks[-1].num_layers * (1 if len(stacks) == 1 else 2)  # and the cross-attentions
    per_token = 2 * num_caches * student.kv_size * 4
    cache = (num_rows + 1) * rollouts.num_tokens * per_token
    num_read = min(PREFILL_TOKENS, rollouts.num_sequences * rollouts.num_tokens)
    prefill = num_read * 4 * (4 * student.hidden_size + 3 * student.mlp_size)
    logits = 4 * 4 * num_rows * student.vocab_size
    return cache + prefill + logits
