"""Measures how far a quantised teacher is from the full teacher.

Both compute the same held-out rows, one after the other, so only one of them is in memory.

N targets, C rows of a chunk, H hidden width, V vocabulary.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from app.contracts.batch_plan import cut_batches
from worker.distill.data.dataset import Rows
from worker.distill.data.rows import Example
from worker.distill.data_parallel import Ranks
from worker.distill.losses.lm_head import Head, load_head, new_scratch, split_rows, write_logits
from worker.distill.missing_results import MissingPart, attempt
from worker.distill.model_pair import ModelPair
from worker.distill.teachers.quantized import check_precision
from worker.distill.training.checkpoint import TrainState
from worker.distill.training.devices import GIB, Placement, teacher_dtypes
from worker.models.architectures import bare_model
from worker.protocol.run_lines import MessageLine, Sink

NUM_ROWS: Final = 64
MOST_TOKENS: Final = 16_384
SPARE_BYTES: Final = GIB  # host memory that is left free
CGROUP: Final = Path("/sys/fs/cgroup")

Json = dict[str, Any]  # Any: part of the public result


def teacher_quality(
    pair: ModelPair,
    rows: Rows,
    state: TrainState,
    *,
    ranks: Ranks,
    sink: Sink,
    check_stop: Callable[[], None],
) -> Json | None:
    """Returns the entry `teacher_quality` of the result, or None if the teacher is not quantised.

    A resumed run takes it from its checkpoint. Otherwise the first rank measures, and an event
    reports the figures. Without them, the entry says why. Raises what `check_stop` raises.
    """
    if pair.precision == "auto":
        return None
    if state.teacher_quality is not None:
        return state.teacher_quality
    measured = ranks.from_first(lambda: _quality(pair, rows, check_stop))
    found: Json = {"precision": pair.precision, **measured}
    sink(MessageLine(message=_message_of(found), data=found))
    return found


def _message_of(found: Json) -> str:
    if "not_measured" in found:
        return f"teacher in {found['precision']}: its loss of quality was not measured, because {found['not_measured']}"
    return (
        f"teacher in {found['precision']}: against the full teacher, the KL divergence is {found['kl']:.2g} nats per "
        f"token, and the most likely token is the same for {found['agreement']:.1%} of {found['num_tokens']:,} tokens "
        f"in {found['num_rows']} held-out rows"
    )


def _quality(pair: ModelPair, rows: Rows, check_stop: Callable[[], None]) -> Json:
    """Returns the figures, or the reason why there are none. Raises UnsupportedPrecision."""
    assert pair.precision != "auto"
    check_precision(pair.precision, pair.teacher.config, device=pair.placement.teacher_device)
    placed = place_full_teacher(pair)
    if isinstance(placed, str):
        return {"not_measured": placed}
    examples = some_rows(rows.teacher[len(rows.train) :])
    if not examples:
        return {"not_measured": "there are no held-out rows"}
    measured = attempt(
        "teacher_quality",
        "measurement_failed",
        lambda: _measured(pair, placed, examples, check_stop),
    )
    return {"not_measured": measured.message} if isinstance(measured, MissingPart) else measured


def _measured(
    pair: ModelPair, placed: Placement, examples: Sequence[Example], check_stop: Callable[[], None]
) -> Json:
    full_NH = _hidden(full_pair(pair, placed), examples, check_stop)
    quantised_NH = _hidden(pair, examples, check_stop)
    head = load_head(pair.teacher_dir, len(pair.teacher.tokenizer))
    kl, agreement = compare(full_NH, quantised_NH, head)
    return {
        "kl": kl,
        "agreement": agreement,
        "num_rows": len(examples),
        "num_tokens": len(full_NH),
        "full_dtype": str(placed.teacher_dtype).removeprefix("torch."),
    }


def some_rows(examples: Sequence[Example]) -> list[Example]:
    """Returns the first rows, as many as are measured."""
    chosen: list[Example] = []
    num_tokens = 0
    for example in examples[:NUM_ROWS]:
        num_tokens += example.num_tokens
        if chosen and num_tokens > MOST_TOKENS:
            break
        chosen.append(example)
    return chosen


def full_pair(pair: ModelPair, placed: Placement) -> ModelPair:
    """Returns the pair with a teacher that is not quantised, on the device of this placement."""
    block = pair.spec.distillation.model_copy(update={"teacher_precision": "auto"})
    spec = pair.spec.model_copy(update={"distillation": block})
    full = replace(pair, spec=spec, card=placed.device)
    vars(full)["placement"] = placed
    return full


def place_full_teacher(pair: ModelPair) -> Placement | str:
    """Returns where the full teacher fits while no other model is loaded, or why it does not.

    On a CPU its matmuls are float32, and its weights exist twice: as they are, and packed.
    """
    if pair.card.name != "cpu":
        needs = replace(pair.needs(pair.micro_tokens, can_cache=False), precision="auto")
        for dtype in teacher_dtypes(pair.card, "auto"):
            if needs.teacher_bytes(dtype) <= pair.card.planned_bytes:
                return Placement(pair.card, "cuda", dtype, micro_tokens=pair.micro_tokens)
    num_parameters = sum(p.numel() for p in bare_model(pair.teacher.config).parameters())
    needed = 8 * num_parameters + SPARE_BYTES
    free = free_memory_bytes()
    if needed > free:
        return f"the full teacher needs {needed / GIB:.1f} GiB of memory, and {free / GIB:.1f} GiB are free"
    exact = pair.card if pair.card.name != "cpu" else replace(pair.card, has_bfloat16=False)
    return Placement(exact, micro_tokens=pair.micro_tokens)


def free_memory_bytes() -> int:
    """Returns the memory that this process can still use: of the machine, or of its container.

    Pages of files count as free, because the system can drop them.
    """
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    try:
        most = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        if most.isdecimal():
            free.append(int(most) - used + int(stat["file"]))
    except (OSError, ValueError, KeyError):  # there is no limit, or another version of cgroups
        pass
    return min(free)


@torch.no_grad()
def _hidden(pair: ModelPair, examples: Sequence[Example], check_stop: Callable[[], None]) -> Tensor:
    """Returns the inputs of the LM head at all targets on the CPU, [N, H]. Frees the teacher."""
    teacher = pair.live_teacher()
    lengths = [example.num_tokens for example in examples]
    found: list[Tensor] = []
    for indices in cut_batches(range(len(examples)), lengths, pair.micro_tokens):
        check_stop()
        found += [
            hidden_TH.float().cpu() for hidden_TH in teacher.hidden([examples[i] for i in indices])
        ]
    del teacher
    gc.collect()  # modules form reference cycles
    return torch.cat(found)


@torch.no_grad()
def compare(full_NH: Tensor, quantised_NH: Tensor, head: Head) -> tuple[float, float]:
    """Returns the mean KL(full || quantised) in nats, and the share of equal most likely tokens."""
    chunks = split_rows(len(full_NH), head, None)
    full_CV, quantised_CV = new_scratch(chunks, head), new_scratch(chunks, head)
    kl = num_equal = 0.0
    for rows in chunks:
        log_p_CV = write_logits(head, full_NH[rows], full_CV).log_softmax(dim=-1)
        log_q_CV = write_logits(head, quantised_NH[rows], quantised_CV).log_softmax(dim=-1)
        kl += float((log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(dim=-1).double().sum())
        num_equal += float((log_p_CV.argmax(dim=-1) == log_q_CV.argmax(dim=-1)).sum())
    return max(0.0, kl / len(full_NH)), num_equal / len(full_NH)
