"""Continues a pile of token prompts with one model and no server: labelling, on-policy data, evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from worker.serve.decoding import decoder
from worker.serve.decoding.families import Context
from worker.serve.decoding.sampling import TokenSampler, seeded_generator
from worker.serve.engine import end_ids as end_ids_of
from worker.serve.errors import BadLogits, PromptTooLong

PREFILL_BUDGET = 2048  # tokens, padding included; nobody waits for a first token here
JOINING_SHARE = (
    4  # a quarter of the rows joins at once: prefills of a few rows waste the matrix units
)


@dataclass(frozen=True)
class Continuation:
    """What a prompt was continued with; is_finished when an end token was reached (it is included)."""

    tokens: tuple[int, ...]
    is_finished: bool


def generate_all(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    end_ids: frozenset[int] | None = None,
    max_running: int = 32,
    max_context_tokens: int | None = None,
    on_answer: Callable[[int, Continuation], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Continuation]:
    """One continuation a prompt, in the prompts' order; prompt i samples with seeds[i], else with seed + i.

    An encoder-decoder encodes its prompt and answers with its decoder's tokens, the start token left out.
    `end_ids` defaults to what the model's own configs say. An answer is cut where the context ends.
    `on_answer(i, continuation)` is called when prompt i ends, `on_progress(num_done, num_tokens)` after
    each step; what they raise ends the call.
    The model may be in training: it is put back as it was. Raises PromptTooLong and BadLogits.
    """
    ends = end_ids_of(model) if end_ids is None else end_ids
    was_training = model.training
    model.eval()
    try:
        width = max((len(prompt) for prompt in prompts), default=0) + max_new_tokens
        runner = decoder.Decoder(
            model,
            max_running=max_running,
            max_context_tokens=min(width, max_context_tokens or width),
            prefill_budget=PREFILL_BUDGET,
            min_joining=max(1, max_running // JOINING_SHARE),
        )
        sequences = [
            decoder.Sequence(
                request_id=str(index),
                prompt=tuple(prompt),
                max_tokens=_room_for(prompt, max_new_tokens, runner.context),
                end_ids=ends,
                sampler=TokenSampler(
                    temperature,
                    top_k,
                    top_p,
                    generator=seeded_generator(seeds[index] if seeds is not None else seed + index),
                ),
            )
            for index, prompt in enumerate(prompts)
        ]
        for sequence in sorted(
            sequences, key=lambda s: -len(s.prompt)
        ):  # equal lengths share a prefill
            runner.add(sequence)
        _run(runner, on_answer, on_progress)
    finally:
        model.train(was_training)
    return [_continuation(sequence) for sequence in sequences]


def _run(
    runner: decoder.Decoder,
    on_answer: Callable[[int, Continuation], None] | None,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    num_done = num_tokens = 0
    while runner.has_work():
        for sequence, pick in runner.step():
            if pick.token is None:
                raise BadLogits("the model computed values that are not numbers while generating")
            num_tokens += 1
            if sequence.finish_reason is not None:
                num_done += 1
                if on_answer is not None:
                    on_answer(int(sequence.request_id), _continuation(sequence))
        if on_progress is not None:
            on_progress(num_done, num_tokens)


def _continuation(sequence: decoder.Sequence) -> Continuation:
    return Continuation(tuple(sequence.tokens), sequence.finish_reason == "stop")


def _room_for(prompt: Sequence[int], max_new_tokens: int, context: Context) -> int:
    if not prompt:
        raise PromptTooLong("an empty prompt cannot be continued; begin it with a start token")
    room = min(max_new_tokens, context.room_for(len(prompt)))
    if room < 1 and context.source_tokens is not None:
        raise PromptTooLong(
            f"a prompt of {len(prompt)} tokens does not fit an encoder of {context.source_tokens}; shorten it"
        )
    if room < 1:
        raise PromptTooLong(
            f"a prompt of {len(prompt)} tokens leaves no room in a context of {context.tokens}; shorten it"
        )
    return room
