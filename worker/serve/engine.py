"""Engine protocol, and its implementation for Hugging Face model classes."""

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Listing
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog
from torch import nn

from app.contracts.generation import GenerateRequest, Reply, Sampling
from worker.serve.cuda_graphs import GraphCache
from worker.serve.decoding.cache_status import CacheStatus
from worker.serve.decoding.cursor_batch import Steps
from worker.serve.decoding.decoder import Decoder, Sequence
from worker.serve.decoding.logit_processors import processor_for, refuse_unknown_tokens
from worker.serve.decoding.sampling import SampledToken, TokenSampler
from worker.serve.device_memory import is_out_of_memory, release_unused
from worker.serve.errors import (
    BadLogits,
    DeadlinePassed,
    EchoUnsupported,
    InvalidGrammar,
    OutOfMemory,
    ServeError,
    failure_of,
)
from worker.serve.grammars.compiler import GrammarCompiler
from worker.serve.grammars.constraint import Constraint
from worker.serve.text.detokenizer import TokenText
from worker.serve.text.prompt_size import size_bound
from worker.serve.text.prompts import end_id_of, prompt_tokens
from worker.serve.text.reply_builder import Answer, begin_answer, num_logprobs_of, seed_of
from worker.serve.text.tokenizer_requests import tokenizer_replies
from worker.serve.text.tools.grammars import constrained

log = structlog.get_logger(__name__)


class Engine(Protocol):
    """Generates text for many requests at once.

    One thread owns an engine. No method except `prompt_of` and `tokenizer_replies` blocks for
    longer than one step.
    """

    @property
    def num_running(self) -> int:
        """Number of sequences (choices) in the batch."""
        ...

    @property
    def num_waiting(self) -> int:
        """Number of sequences that were added and are not in the batch yet."""
        ...

    def has_work(self) -> bool:
        """Returns whether `step` would compute anything or return replies."""
        ...

    def cache_status(self) -> CacheStatus:
        """Returns the use of the KV cache and of the prefix cache."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Memory of the caches, as far as it is not counted with the weights."""
        ...

    def limit_cache(self, num_bytes: int) -> None:
        """Sets the memory that the caches may take. Sequences wait if there is too little."""
        ...

    def free_cache(self) -> None:
        """Frees the memory of the caches if no sequence runs."""
        ...

    def prompt_of(self, request: GenerateRequest) -> tuple[int, ...]:
        """Returns the prompt tokens of a request. Thread-safe. Raises ServeError."""
        ...

    def tokenizer_replies(self, request: GenerateRequest) -> tuple[Reply, ...]:
        """Returns the replies to a request about the tokenizer. Thread-safe. Raises ServeError."""
        ...

    def add(self, request: GenerateRequest, prompt: tuple[int, ...] | None = None) -> None:
        """Adds a request. `prompt` is the result of `prompt_of`, if that was called.

        An invalid request is reported as a Failure by the next `step`.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Removes a request and frees its rows at once, without a reply. Ignores unknown ids."""
        ...

    def step(self) -> list[Reply]:
        """Advances the running sequences and returns the replies that are due."""
        ...


@dataclass
class TransformersEngine:
    """Engine that runs a Hugging Face model in a shared-cursor batch.

    `clock` returns seconds since the epoch. `steps` says how decode steps run.
    """

    model: nn.Module
    tokenizer: Any  # transformers is untyped here
    max_running: int
    max_context_tokens: int
    clock: Callable[[], float] = time.time
    steps: Steps = "auto"
    _live: dict[str, Answer] = field(default_factory=dict, init=False)
    _outbox: list[Reply] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.model.eval()
        self._decoder = self._make_decoder()
        self._text = TokenText(self.tokenizer)
        self._size_bound = size_bound(self.tokenizer, end_id_of(self.tokenizer))
        self._end_ids = end_ids(self.model, self.tokenizer)
        # get_input_embeddings is a method, but typed as a tensor
        embeddings: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        self._vocab_size: int = embeddings.num_embeddings
        # The vocabulary of a decoder may differ from that of its encoder.
        config: Any = self.model.config
        self._num_logits: int = config.get_text_config(decoder=True).vocab_size
        self._grammars = GrammarCompiler(
            self._text, num_logits=self._num_logits, end_ids=self._end_ids
        )

    def prepare_grammars(self) -> None:
        """Builds the vocabulary for grammars, which holds the GIL for a while.

        Without this call, the first request with a grammar builds it. A model that cannot follow
        grammars is not an error: only its requests with a grammar fail.
        """
        with suppress(InvalidGrammar):
            self._grammars.prepare()

    def _make_decoder(self) -> Decoder:
        return Decoder(
            self.model,
            max_running=self.max_running,
            max_context_tokens=self.max_context_tokens,
            steps=self.steps,
        )

    @property
    def num_running(self) -> int:
        return self._decoder.num_running

    @property
    def num_waiting(self) -> int:
        return self._decoder.num_waiting

    def has_work(self) -> bool:
        return bool(self._outbox) or self._decoder.has_work()

    def cache_status(self) -> CacheStatus:
        return self._decoder.cache_status()

    @property
    def cache_bytes(self) -> int:
        return self._decoder.cache_bytes

    @property
    def graphs(self) -> GraphCache | None:
        """The CUDA graphs of decode steps, if they are used."""
        static = self._decoder.batch.static
        return None if static is None else static.graphs

    def limit_cache(self, num_bytes: int) -> None:
        self._decoder.limit_cache(num_bytes)

    def free_cache(self) -> None:
        self._decoder.free_cache()

    def prompt_of(self, request: GenerateRequest) -> tuple[int, ...]:
        request = constrained(request, self._text)
        prompt = prompt_tokens(
            request,
            self.tokenizer,
            vocab_size=self._vocab_size,
            context=self._decoder.context,
            bound=self._size_bound,
        )
        if request.sampling.grammar is not None:
            self._grammars.compile(request.sampling.grammar)
        return prompt

    def tokenizer_replies(self, request: GenerateRequest) -> tuple[Reply, ...]:
        return tokenizer_replies(request, self.tokenizer, vocab_size=self._vocab_size)

    def add(self, request: GenerateRequest, prompt: tuple[int, ...] | None = None) -> None:
        try:
            request = constrained(request, self._text)
            prompt = self.prompt_of(request) if prompt is None else prompt
            refuse_unknown_tokens(request.sampling, self._num_logits)
            if request.sampling.echo and self._has_encoder:
                raise EchoUnsupported(
                    "echo is not supported by encoder-decoder models, whose answer does not continue the prompt; leave echo out"
                )
            sequences = [
                self._sequence(request, prompt, choice) for choice in range(request.num_sequences)
            ]
        except ServeError as error:
            self._outbox.append(failure_of(request.id, error))
            return
        self._live[request.id] = begin_answer(
            request, prompt, self._text, is_continued=not self._has_encoder
        )
        for sequence in sequences:
            self._decoder.add(sequence)

    @property
    def _has_encoder(self) -> bool:
        return self._decoder.context.source_tokens is not None

    def _sequence(self, request: GenerateRequest, prompt: tuple[int, ...], choice: int) -> Sequence:
        sampling = request.sampling
        end_ids = request_end_ids(sampling, self._end_ids)
        # The tokens that repetition_penalty counts, as in generate(). A decoder with an encoder has
        # read its start token only.
        context = (self._decoder.batch.family.start_token,) if self._has_encoder else prompt
        return Sequence(
            request_id=request.id,
            prompt=prompt,
            max_tokens=min(sampling.max_tokens, self._decoder.context.room_for(len(prompt))),
            end_ids=end_ids,
            sampler=TokenSampler.of(
                sampling,
                num_logprobs=num_logprobs_of(request),
                seed=seed_of(request, choice),
                processor=processor_for(sampling, context=context, end_ids=end_ids),
                constraint=self._constraint(request, prompt),
            ),
            choice=choice,
            tenant=request.tenant,
            num_prompt_logprobs=sampling.logprobs if sampling.scores_prompt else None,
        )

    def _constraint(self, request: GenerateRequest, prompt: tuple[int, ...]) -> Constraint | None:
        grammar = request.sampling.grammar
        if grammar is None:
            return None
        window = () if self._has_encoder else self._text.window_after(prompt)
        return self._grammars.constraint(grammar, window)

    def abort(self, request_id: str) -> None:
        self._outbox = [reply for reply in self._outbox if reply.id != request_id]
        if self._live.pop(request_id, None) is not None:
            self._decoder.drop(lambda sequence: sequence.request_id == request_id)

    def step(self) -> list[Reply]:
        replies, self._outbox = self._outbox, []
        now = self.clock()
        for live in [live for live in self._live.values() if live.request.deadline_at < now]:
            replies.append(
                self._fail(
                    live, DeadlinePassed("the request timed out; ask for fewer tokens, or retry")
                )
            )
        picks = self._decode()
        if picks is None:
            return replies + self._end_lost()
        for sequence, pick in picks:
            live_now = self._live.get(sequence.request_id)
            if live_now is not None:
                replies += self._deliver(live_now, sequence, pick)
        return replies

    def _decode(self) -> Iterable[tuple[Sequence, SampledToken]] | None:
        """Returns the next tokens, or None if memory is exhausted."""
        try:
            return self._decoder.step()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("out_of_memory", num_running=self.num_running, reason=str(error))
            return None

    def _end_lost(self) -> list[Reply]:
        """Ends the requests that ran out of memory. The others continue with the next step."""
        lost = dict.fromkeys(sequence.request_id for sequence in self._decoder.recover())
        error = OutOfMemory(
            "the serve worker has too little memory for this request now; retry, or send a shorter "
            "prompt, fewer choices or a lower max_tokens"
        )
        replies = [self._fail(self._live[id_], error) for id_ in lost if id_ in self._live]
        release_unused()
        return replies

    def _deliver(self, answer: Answer, sequence: Sequence, pick: SampledToken) -> list[Reply]:
        answer.num_cached = max(answer.num_cached, sequence.num_cached)
        scores, sequence.prompt_picks = sequence.prompt_picks, []
        if scores:
            answer.scores[sequence.choice] = scores
        if pick.token is None or any(score.token is None for score in scores):
            error = _why_no_token(answer.request, sequence.sampler.constraint)
            return [self._fail(answer, error)]
        reason = sequence.finish_reason
        try:
            taken = answer.take(sequence.choice, pick, reason)
        except ServeError as error:  # from decoding the text
            return [self._fail(answer, error)]
        if taken.is_choice_over and reason is None:
            self._decoder.drop(lambda other: other is sequence)
        if taken.is_over:
            del self._live[answer.request.id]
        return taken.replies

    def _fail(self, answer: Answer, error: ServeError) -> Reply:
        self.abort(answer.request.id)
        return failure_of(answer.request.id, error)


def _why_no_token(request: GenerateRequest, constraint: Constraint | None) -> ServeError:
    grammar = request.sampling.grammar
    if grammar is not None and constraint is not None and constraint.fault is not None:
        return InvalidGrammar(
            f"the grammar is too complex for this answer ({constraint.fault}); use a simpler one"
        ).about(grammar)
    return BadLogits("the model computed NaN or infinite logits; its weights are damaged")


def end_ids(
    model: nn.Module, tokenizer: Any = None
) -> frozenset[int]:  # Any: transformers is untyped here
    """Returns the tokens that end an answer, from the model's configs and its tokenizer."""
    return ends_named_in([getattr(model, "generation_config", None), model.config], tokenizer)


def request_end_ids(sampling: Sampling, model_end_ids: frozenset[int]) -> frozenset[int]:
    """Returns the tokens that end an answer to one request, given those of the model."""
    request_ids = frozenset(sampling.stop_token_ids)
    return request_ids if sampling.ignore_eos else request_ids | model_end_ids


def ends_named_in(configs: Listing[Any], tokenizer: Any = None) -> frozenset[int]:
    """Returns the end tokens that the configs and the tokenizer name. A config may be None."""
    found: set[int] = set()
    for ids in (
        *(getattr(config, "eos_token_id", None) for config in configs),
        end_id_of(tokenizer),
    ):
        found |= set(ids) if isinstance(ids, list | tuple) else set() if ids is None else {ids}
    return frozenset(found)
