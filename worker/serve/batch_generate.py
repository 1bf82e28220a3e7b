"""Generates continuations of many token prompts with one model, without a server.

It is used for teacher answers, rollouts and evaluation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from worker.serve.decoding import decoder
from worker.serve.decoding.cursor_batch import Steps
from worker.serve.decoding.families import Context
from worker.serve.decoding.sampling import TokenSampler, seeded_generator
from worker.serve.engine import end_ids as end_ids_of
from worker.serve.errors import BadLogits, PromptTooLong

PREFILL_BUDGET = 2048  # tokens, padding included; the time to a first token does not matter
# A quarter of the rows joins at once, because prefills of a few rows use the hardware badly.
JOINING_SHARE = 4
# In a training run, memory is planned without CUDA graphs. Autocast keeps copies of weights there,
# which graphs must not outlive.
STEPS: Final[Steps] = "plain"


@dataclass(frozen=True)
class Continuation:
    """Continuation of one prompt.

    `is_finished` is true if it ends with an end token, which `tokens` includes.
    """

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
    on_states: Callable[[int, Tensor], None] | None = None,
    steps: Steps = STEPS,
) -> list[Continuation]:
    """Returns one continuation per prompt, in the order of the prompts.

    Prompt i samples with seeds[i], or with seed + i without `seeds`. For an encoder-decoder, the
    encoder reads the prompt, and the continuation excludes the start token. `end_ids` defaults to
    those of the model's configs. Continuations are cut at the end of the context.

    `on_answer(i, continuation)` is called when prompt i ends, `on_progress(num_done, num_tokens)`
    after each step. `on_states(i, states_TH)` is called before `on_answer` with the inputs of the LM
    head from which the T tokens were chosen. It needs plain steps of a decoder-only model. Exceptions
    of the callbacks propagate. The training mode of the model is restored.
    Raises PromptTooLong or BadLogits.
    """
    ends = end_ids_of(model) if end_ids is None else end_ids
    seeds = range(seed, seed + len(prompts)) if seeds is None else seeds
    was_training = model.training
    model.eval()
    try:
        width = max((len(prompt) for prompt in prompts), default=0) + max_new_tokens
        runner = _decoder(model, max_running, min(width, max_context_tokens or width), steps)
        sequences = [
            decoder.Sequence(
                request_id=str(index),
                prompt=tuple(prompt),
                max_tokens=_room_for(prompt, max_new_tokens, runner.context),
                end_ids=ends,
                sampler=TokenSampler(temperature, top_k, top_p, generator=seeded_generator(own)),
            )
            for index, (prompt, own) in enumerate(zip(prompts, seeds, strict=True))
        ]
        # prompts of similar length share a prefill
        for sequence in sorted(sequences, key=lambda s: -len(s.prompt)):
            runner.add(sequence)
        with _KeptStates(model, on_states) as states:
            _run(runner, states, on_answer, on_progress)
    finally:
        model.train(was_training)
    return [_continuation(sequence) for sequence in sequences]


def _decoder(
    model: nn.Module, max_running: int, max_context_tokens: int, steps: Steps
) -> decoder.Decoder:
    return decoder.Decoder(
        model,
        max_running=max_running,
        max_context_tokens=max_context_tokens,
        prefill_budget=PREFILL_BUDGET,
        min_joining=max(1, max_running // JOINING_SHARE),
        steps=steps,
    )


class _KeptStates:
    """Inputs of the LM head from which the tokens of the running sequences were chosen.

    `on_states` receives those of each sequence when it ends. Without it, nothing is kept.
    """

    def __init__(self, model: nn.Module, on_states: Callable[[int, Tensor], None] | None) -> None:
        self._model: Any = model  # transformers is untyped here
        self._on_states = on_states
        self._latest: list[Tensor] = []  # of the forward passes of this step
        self._kept: dict[str, list[Tensor]] = {}
        self._handle: RemovableHandle | None = None

    def __enter__(self) -> "_KeptStates":
        if self._on_states is not None:
            head = self._model.get_output_embeddings()
            self._handle = head.register_forward_pre_hook(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _keep(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._latest.append(inputs[0][:, -1])  # [N, Q, H]; the last token's logits are used

    def take(self, sequences: Sequence[decoder.Sequence]) -> None:
        """Assigns the states of a step to its sequences, and passes on those that are complete."""
        if self._on_states is None:
            return
        states_NH = torch.cat(self._latest).float()
        self._latest.clear()
        assert len(states_NH) == len(sequences), "the LM head was called once per sequence"
        for sequence, state_H in zip(sequences, states_NH, strict=True):
            self._kept.setdefault(sequence.request_id, []).append(state_H)
            if sequence.finish_reason is not None:
                kept = self._kept.pop(sequence.request_id)
                self._on_states(int(sequence.request_id), torch.stack(kept))


def _run(
    runner: decoder.Decoder,
    states: _KeptStates,
    on_answer: Callable[[int, Continuation], None] | None,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    num_done = num_tokens = 0
    while runner.has_work():
        steps = list(runner.step())
        states.take([sequence for sequence, _ in steps])
        for sequence, pick in steps:
            if pick.token is None:
                raise BadLogits("the model computed NaN or infinite logits while generating")
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
        raise PromptTooLong("an empty prompt cannot be continued; start it with a start token")
    room = min(max_new_tokens, context.room_for(len(prompt)))
    if room < 1 and context.source_tokens is not None:
        raise PromptTooLong(
            f"a prompt of {len(prompt)} tokens does not fit in the encoder, which takes at most {context.source_tokens}; shorten it"
        )
    if room < 1:
        raise PromptTooLong(
            f"a prompt of {len(prompt)} tokens leaves no room for an answer in a context of {context.tokens}; shorten it"
        )
    return room
