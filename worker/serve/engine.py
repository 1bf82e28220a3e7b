"""Requests in, replies out: the engine protocol and its implementation over Hugging Face model classes."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from app.contracts import Delta, Done, GenerateRequest, Reply
from worker.serve.decoder import Decoder, Sequence
from worker.serve.errors import BadLogits, DeadlinePassed, ServeError, failure_of
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
    """A request under way."""

    request: GenerateRequest
    num_prompt_tokens: int
    streams: list[TextStream]
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
        self._decoder = Decoder(
            self.model, max_running=self.max_running, max_context_tokens=self.max_context_tokens
        )
        self._text = TokenText(self.tokenizer)
        self._end_ids = end_ids(self.model, self.tokenizer)
        embeddings: Any = self.model.get_input_embeddings()  # type: ignore[operator]  # a method, typed as a tensor
        self._vocab_size: int = embeddings.num_embeddings

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
        except ServeError as error:
            self._outbox.append(failure_of(request.id, error))
            return
        sampling = request.sampling
        # what an encoder reads is not continued
        before = prompt if self._decoder.context.source_tokens is None else ()
        streams = [TextStream(self._text, prompt=before, stop=sampling.stop) for _ in range(request.n)]
        self._live[request.id] = _Live(request, len(prompt), streams, num_open=request.n)
        for choice in range(request.n):
            seed = None if sampling.seed is None else sampling.seed + choice
            sequence = Sequence(
                request_id=request.id,
                prompt=prompt,
                max_tokens=min(sampling.max_tokens, self._decoder.context.room_for(len(prompt))),
                end_ids=frozenset() if sampling.ignore_eos else self._end_ids,
                chooser=Chooser(
                    temperature=sampling.temperature,
                    top_k=sampling.top_k,
                    top_p=sampling.top_p,
                    num_logprobs=sampling.logprobs,
                    generator=seeded_generator(seed),
                ),
                choice=choice,
            )
            self._decoder.add(sequence)

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
        stream = live.streams[sequence.choice]
        reason = sequence.finish_reason
        piece = stream.end() if reason == "stop" else stream.push(pick, is_last=reason == "length")
        if piece.is_stopped:
            if reason is None:
                self._decoder.drop(lambda other: other is sequence)
            reason = "stop"
        if not (reason or piece.text or piece.picks):
            return []
        replies: list[Reply] = [self._delta(live, sequence.choice, piece, reason)]
        if reason:
            live.num_open -= 1
        if not live.num_open:
            del self._live[live.request.id]
            replies.append(
                Done(
                    id=live.request.id,
                    prompt_tokens=live.num_prompt_tokens,
                    completion_tokens=live.num_completion_tokens,
                )
            )
        return replies

    def _delta(
        self, live: _Live, choice: int, piece: Piece, reason: Any
    ) -> Delta:  # Any: Delta's own literal
        logprobs = None
        if live.request.sampling.logprobs is not None:
            logprobs = tuple(found for pick in piece.picks if (found := self._text.logprob_of(pick)))
        return Delta(
            id=live.request.id,
            choice=choice,
            text=piece.text,
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
