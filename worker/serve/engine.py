"""Requests in, replies out: the engine protocol and its implementation over Hugging Face model classes."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from torch import nn

from app.contracts import Delta, Done, GenerateRequest, Reply
from worker.serve.best_of import BestOf
from worker.serve.decoder import Decoder, Sequence
from worker.serve.errors import BadLogits, DeadlinePassed, EchoUnsupported, ServeError, failure_of
from worker.serve.logits import processor_for, refuse_unknown_tokens
from worker.serve.prompts import end_id_of, prompt_tokens
from worker.serve.sampling import Chooser, Pick, seeded_generator
from worker.serve.stream import Piece, TextStream, TokenText


class Engine(Protocol):
    """Generates for many requests at once. One thread owns it; nothing here blocks longer than a step."""

    @property
    def num_running(self) -> int:
        """Sequences (choices) in the batch."""
        ...

    @property
    def num_waiting(self) -> int:
        """Sequences admitted and not yet in the batch."""
        ...

    def has_work(self) -> bool:
        """Whether `step` would give or compute anything."""
        ...

    def add(self, request: GenerateRequest) -> None:
        """Takes a request; what is wrong with it comes as a Failure from the next step."""
        ...

    def abort(self, request_id: str) -> None:
        """Forgets a request and frees its rows at once; no reply follows. Unknown ids are ignored."""
        ...

    def step(self) -> list[Reply]:
        """Advances every running sequence by a token and gives what became certain."""
        ...


@dataclass
class _Live:
    """A request under way. `echoes` holds the prompt's text for each choice that has not said it yet."""

    request: GenerateRequest
    num_prompt_tokens: int
    streams: list[TextStream]
    echoes: dict[int, str]
    best_of: BestOf | None
    num_open: int
    num_completion_tokens: int = 0


@dataclass
class TransformersEngine:
    """The shared-cursor batch behind the Engine protocol. `clock` gives seconds since the epoch."""

    model: nn.Module
    tokenizer: Any  # transformers is untyped here
    max_running: int
    max_context_tokens: int
    clock: Callable[[], float] = time.time
    _live: dict[str, _Live] = field(default_factory=dict, init=False)
    _outbox: list[Reply] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.model.eval()
        self._decoder = self._make_decoder()
        self._text = TokenText(self.tokenizer)
        self._end_ids = end_ids(self.model, self.tokenizer)
        embeddings: Any = self.model.get_input_embeddings()  # type: ignore[operator]  # a method, typed as a tensor
        self._vocab_size: int = embeddings.num_embeddings
        config: Any = self.model.config  # of an encoder-decoder, the half that writes may have other words
        self._num_logits: int = config.get_text_config(decoder=True).vocab_size

    def _make_decoder(self) -> Decoder:
        return Decoder(self.model, max_running=self.max_running, max_context_tokens=self.max_context_tokens)

    @property
    def num_running(self) -> int:
        return self._decoder.num_running

    @property
    def num_waiting(self) -> int:
        return self._decoder.num_waiting

    def has_work(self) -> bool:
        return bool(self._outbox) or self._decoder.has_work()

    def add(self, request: GenerateRequest) -> None:
        try:
            prompt = prompt_tokens(
                request,
                self.tokenizer,
                vocab_size=self._vocab_size,
                context=self._decoder.context,
            )
            refuse_unknown_tokens(request.sampling, self._num_logits)
            if request.sampling.echo and self._has_encoder:
                raise EchoUnsupported(
                    "this model's answer does not continue the prompt, which its encoder reads; leave echo out"
                )
        except ServeError as error:
            self._outbox.append(failure_of(request.id, error))
            return
        self._live[request.id] = self._begin(request, prompt)
        for choice in range(request.num_sequences):
            self._decoder.add(self._sequence(request, prompt, choice))

    @property
    def _has_encoder(self) -> bool:
        return self._decoder.context.source_tokens is not None

    def _begin(self, request: GenerateRequest, prompt: tuple[int, ...]) -> _Live:
        sampling, num_sequences = request.sampling, request.num_sequences
        before = () if self._has_encoder else prompt  # what an encoder reads is not continued
        stream_of = partial(
            TextStream, self._text, prompt=before, stop=sampling.stop, min_tokens=sampling.min_tokens
        )
        shown = request.text if request.text is not None else self._text.decode(prompt)
        return _Live(
            request,
            len(prompt),
            streams=[stream_of() for _ in range(num_sequences)],
            echoes=dict.fromkeys(range(num_sequences), shown) if sampling.echo else {},
            best_of=BestOf(num_sequences) if num_sequences > request.n else None,
            num_open=num_sequences,
        )

    def _sequence(self, request: GenerateRequest, prompt: tuple[int, ...], choice: int) -> Sequence:
        sampling = request.sampling
        seed = None if sampling.seed is None else sampling.seed + choice
        num_logprobs = sampling.logprobs
        if num_logprobs is None and request.num_sequences > request.n:
            num_logprobs = 0  # best_of ranks by those of the chosen tokens
        end_ids = frozenset() if sampling.ignore_eos else self._end_ids
        # as generate() has it, for repetition_penalty: a decoder behind an encoder has read its start token alone
        context = (self._decoder.batch.family.start_token,) if self._has_encoder else prompt
        return Sequence(
            request_id=request.id,
            prompt=prompt,
            max_tokens=min(sampling.max_tokens, self._decoder.context.room_for(len(prompt))),
            end_ids=end_ids,
            chooser=Chooser(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                num_logprobs=num_logprobs,
                generator=seeded_generator(seed),
                has_seed=seed is not None,
                processor=processor_for(sampling, context=context, end_ids=end_ids),
            ),
            choice=choice,
        )

    def abort(self, request_id: str) -> None:
        self._outbox = [reply for reply in self._outbox if reply.id != request_id]
        if self._live.pop(request_id, None) is not None:
            self._decoder.drop(lambda sequence: sequence.request_id == request_id)

    def step(self) -> list[Reply]:
        replies, self._outbox = self._outbox, []
        now = self.clock()
        for live in [live for live in self._live.values() if live.request.deadline_at < now]:
            replies.append(
                self._fail(live, DeadlinePassed("the request's time is up; ask for fewer tokens or retry"))
            )
        for sequence, pick in self._decoder.step():
            live_now = self._live.get(sequence.request_id)
            if live_now is not None:
                replies += self._deliver(live_now, sequence, pick)
        return replies

    def _deliver(self, live: _Live, sequence: Sequence, pick: Pick) -> list[Reply]:
        if pick.token is None:
            return [
                self._fail(
                    live, BadLogits("the model computed values that are not numbers; its weights are bad")
                )
            ]
        live.num_completion_tokens += 1
        if live.best_of is not None and pick.logprob is not None:
            live.best_of.record(sequence.choice, pick.logprob)
        stream = live.streams[sequence.choice]
        reason = sequence.finish_reason
        piece = stream.end() if reason == "stop" else stream.push(pick, is_last=reason == "length")
        if piece.is_stopped:
            if reason is None:
                self._decoder.drop(lambda other: other is sequence)
            reason = "stop"
        if not (reason or piece.text or piece.picks):
            return []
        delta = self._delta(live, sequence.choice, piece, reason)
        replies: list[Reply] = [delta] if live.best_of is None else []
        if live.best_of is not None:
            live.best_of.hold(delta)
        if reason:
            live.num_open -= 1
        return replies if live.num_open else replies + self._end(live)

    def _end(self, live: _Live) -> list[Reply]:
        del self._live[live.request.id]
        done = Done(
            id=live.request.id,
            prompt_tokens=live.num_prompt_tokens,
            completion_tokens=live.num_completion_tokens,
        )
        best = [] if live.best_of is None else live.best_of.best(live.request.n)
        return [*best, done]

    def _delta(
        self, live: _Live, choice: int, piece: Piece, reason: Any
    ) -> Delta:  # Any: Delta's own literal
        logprobs = None
        if live.request.sampling.logprobs is not None:
            logprobs = tuple(found for pick in piece.picks if (found := self._text.logprob_of(pick)))
        return Delta(
            id=live.request.id,
            choice=choice,
            text=live.echoes.pop(choice, "") + piece.text,
            tokens=tuple(pick.token for pick in piece.picks if pick.token is not None),
            logprobs=logprobs,
            finish_reason=reason,
        )

    def _fail(self, live: _Live, error: ServeError) -> Reply:
        self.abort(live.request.id)
        return failure_of(live.request.id, error)


def end_ids(model: nn.Module, tokenizer: Any = None) -> frozenset[int]:  # Any: transformers is untyped here
    """Tokens that end an answer, by the model's generation config, its config and its tokenizer."""
    configs = [getattr(model, "generation_config", None), model.config]
    found: set[int] = set()
    for ids in (*(getattr(config, "eos_token_id", None) for config in configs), end_id_of(tokenizer)):
        found |= set(ids) if isinstance(ids, list | tuple) else set() if ids is None else {ids}
    return frozenset(found)
