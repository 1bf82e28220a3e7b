"""Engine that uses vLLM for scheduling, KV cache and sampling.

Prompt tokens, text and replies are made as in the other engines. vLLM runs in the worker's process,
so that both end together. It is installed in a separate environment, and imported when the first
model is served with it.
"""

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.contracts.generation import GenerateRequest, Grammar, Reply, Sampling
from worker.serve.decoding.cache_status import CacheStatus
from worker.serve.decoding.fair_queue import FairQueue
from worker.serve.decoding.families import SEQ2SEQ, Context
from worker.serve.decoding.logit_processors import refuse_unknown_tokens
from worker.serve.decoding.prompt_scores import MIN_LOGPROB
from worker.serve.decoding.sampling import SampledToken
from worker.serve.engine import ends_named_in, request_end_ids
from worker.serve.errors import (
    DeadlinePassed,
    InvalidSampling,
    ModelLoadFailed,
    OptionUnavailable,
    ServeError,
    UnsupportedModel,
    failure_of,
)
from worker.serve.grammars.check_process import GRAMMAR_CHECKER
from worker.serve.loading import refuse_code
from worker.serve.text.detokenizer import TokenText
from worker.serve.text.prompt_size import size_bound
from worker.serve.text.prompts import end_id_of, prompt_tokens
from worker.serve.text.reply_builder import (
    Answer,
    FinishReason,
    begin_answer,
    num_logprobs_of,
    seed_of,
)
from worker.serve.text.tokenizer_requests import tokenizer_replies
from worker.serve.text.tools.grammars import constrained
from worker.serve.vllm_core import VllmDraft, has_vllm, make_core, release_core

FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}

Vllm = Any  # vLLM is not installed where this is type-checked


@dataclass(frozen=True, eq=False)
class _Choice:
    """One choice of a request."""

    request: GenerateRequest
    prompt: tuple[int, ...]
    number: int

    @property
    def name(self) -> str:
        """Request id in vLLM."""
        return f"{self.request.id}/{self.number}"


class VllmEngine:
    """Engine that runs one model in vLLM.

    `core` is an `LLMEngine`, see `make_core`. `clock` returns seconds since the epoch. Unlike
    TransformersEngine, it applies `min_p` before `top_k` and `top_p`, and does not detect logits
    that are not finite.
    """

    def __init__(
        self,
        core: Vllm,
        tokenizer: Any,  # transformers is untyped here
        *,
        end_ids: frozenset[int],
        has_draft: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._core = core
        self._tokenizer = tokenizer
        self._text = TokenText(tokenizer)
        self._size_bound = size_bound(tokenizer, end_id_of(tokenizer))
        self._end_ids = end_ids
        self._has_draft = has_draft
        self._clock = clock
        self._context = Context(core.model_config.max_model_len)
        self._vocab_size: int = core.model_config.get_vocab_size()
        self._answers: dict[str, Answer] = {}
        # vLLM schedules first come, first served. For fairness it gets the choices in the order of
        # this queue, and no more than it can run.
        self._waiting: FairQueue[_Choice] = FairQueue(lambda choice: choice.request.tenant)
        self._max_running: int = core.vllm_config.scheduler_config.max_num_seqs
        self._choices: dict[str, _Choice] = {}  # by vLLM's request id
        self._begun: set[str] = set()  # vLLM's request ids that have tokens
        self._outbox: list[Reply] = []
        self._num_prefix_queries = self._num_prefix_hits = 0
        weakref.finalize(self, release_core, core)

    @property
    def num_running(self) -> int:
        return len(self._begun)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._choices) - len(self._begun)

    def has_work(self) -> bool:
        return bool(self._outbox or self._choices or self._waiting)

    def cache_status(self) -> CacheStatus:
        return CacheStatus(self._cache_usage(), self._num_prefix_queries, self._num_prefix_hits)

    def _cache_usage(self) -> float:
        """Returns the used fraction of the KV cache, or 0 if this version of vLLM does not tell it.

        The figure is not part of vLLM's public interface, and a heartbeat must not fail without it.
        """
        try:
            return float(self._core.engine_core.engine_core.scheduler.kv_cache_manager.usage)
        except (AttributeError, TypeError):
            return 0.0

    @property
    def cache_bytes(self) -> int:
        return 0  # vLLM allocates its cache with the weights, and `load_vllm` counts both

    def limit_cache(self, num_bytes: int) -> None:
        pass

    def free_cache(self) -> None:
        pass

    def prompt_of(self, request: GenerateRequest) -> tuple[int, ...]:
        request = constrained(request, self._text)
        prompt = prompt_tokens(
            request,
            self._tokenizer,
            vocab_size=self._vocab_size,
            context=self._context,
            bound=self._size_bound,
        )
        if request.sampling.grammar is not None:
            # in a child process: vLLM compiles it in this one
            GRAMMAR_CHECKER.demand_compilable(request.sampling.grammar)
        return prompt

    def tokenizer_replies(self, request: GenerateRequest) -> tuple[Reply, ...]:
        return tokenizer_replies(request, self._tokenizer, vocab_size=self._vocab_size)

    def add(self, request: GenerateRequest, prompt: tuple[int, ...] | None = None) -> None:
        try:
            request = constrained(request, self._text)
            prompt = self.prompt_of(request) if prompt is None else prompt
            refuse_unknown_tokens(request.sampling, self._vocab_size)
            if self._has_draft:
                refuse_beside_draft(request.sampling)
        except ServeError as error:
            self._outbox.append(failure_of(request.id, error))
            return
        self._answers[request.id] = begin_answer(request, prompt, self._text, is_continued=True)
        for number in range(request.num_sequences):
            self._waiting.add(_Choice(request, prompt, number))

    def _hand_over(self) -> None:
        """Passes the next choices to vLLM, as far as it has room."""
        while (
            len(self._choices) < self._max_running and (choice := self._waiting.peek()) is not None
        ):
            # only the first choice is charged for the prompt, whose cache blocks all choices share
            self._waiting.take(0 if choice.number else len(choice.prompt))
            self._choices[choice.name] = choice
            try:
                self._start(choice)
            except ServeError as error:
                self._forget([choice.name])
                failure = self._fail(self._answers[choice.request.id], error)
                self._outbox.append(failure)

    def _start(self, choice: "_Choice") -> None:
        from vllm.inputs.engine import tokens_input

        params = self._params(choice.request, choice.prompt, choice.number)
        try:
            self._core.add_request(choice.name, tokens_input(list(choice.prompt)), params)
        except ValueError as error:
            raise InvalidSampling(f"vLLM rejects this request: {error}") from error

    def _params(self, request: GenerateRequest, prompt: tuple[int, ...], choice: int) -> Vllm:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        seed = seed_of(request, choice)
        end_ids = request_end_ids(sampling, self._end_ids)
        # vLLM always generates a token. The answer leaves it out if max_tokens is 0.
        max_tokens = max(1, min(sampling.max_tokens, self._context.room_for(len(prompt))))
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min(sampling.min_tokens, max_tokens) if end_ids else 0,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            repetition_penalty=sampling.repetition_penalty,
            logit_bias=dict(sampling.logit_bias) or None,
            seed=None if seed is None else seed % 2**63,
            logprobs=num_logprobs_of(request),
            prompt_logprobs=sampling.logprobs if sampling.scores_prompt else None,
            stop_token_ids=sorted(end_ids),
            ignore_eos=True,  # stop_token_ids has all end tokens
            detokenize=False,
            structured_outputs=_structured_outputs(sampling.grammar),
            output_kind=RequestOutputKind.DELTA,
        )

    def abort(self, request_id: str) -> None:
        self._outbox = [reply for reply in self._outbox if reply.id != request_id]
        if self._answers.pop(request_id, None) is not None:
            self._waiting.remove(lambda choice: choice.request.id == request_id)
            names = [
                name for name, choice in self._choices.items() if choice.request.id == request_id
            ]
            self._core.abort_request(names)
            self._forget(names)

    def _forget(self, names: list[str]) -> None:
        self._begun.difference_update(names)
        for name in names:
            self._waiting.finish(self._choices.pop(name))

    def step(self) -> list[Reply]:
        self._hand_over()
        replies, self._outbox = self._outbox, []
        now = self._clock()
        for answer in [a for a in self._answers.values() if a.request.deadline_at < now]:
            late = DeadlinePassed("the request timed out; ask for fewer tokens, or retry")
            replies.append(self._fail(answer, late))
        if self._choices:
            for output in self._core.step():
                replies += self._deliver(output)
        return replies

    def _deliver(self, output: Vllm) -> list[Reply]:
        name, (completion,) = output.request_id, output.outputs
        if name not in self._choices:
            return []
        choice = self._choices[name]
        answer = self._answers[choice.request.id]
        reason = completion.finish_reason
        if reason is not None and (reason not in FINISH_REASONS or not completion.token_ids):
            return [self._fail(answer, ServeError(f"vLLM stopped this request ({reason}); retry"))]
        if name not in self._begun and output.prompt_logprobs:
            answer.scores[choice.number] = _scores(choice, output.prompt_logprobs)
        if name not in self._begun:
            self._begun.add(name)
            num_cached = output.num_cached_tokens or 0
            answer.num_cached = max(answer.num_cached, num_cached)
            self._num_prefix_queries += len(choice.prompt)
            self._num_prefix_hits += num_cached
        replies: list[Reply] = []
        self._waiting.charge(choice, len(completion.token_ids))
        last = len(completion.token_ids) - 1
        for at, token in enumerate(completion.token_ids):
            pick = _pick(
                token, completion.logprobs[at] if completion.logprobs else None, answer.request
            )
            try:
                taken = answer.take(
                    choice.number, pick, FINISH_REASONS[reason] if reason and at == last else None
                )
            except ServeError as error:  # from decoding the text
                return [*replies, self._fail(answer, error)]
            replies += taken.replies
            if taken.is_choice_over:
                if reason is None:
                    self._core.abort_request([name])
                self._forget([name])
                break
        if answer.num_open == 0:
            del self._answers[answer.request.id]
        return replies

    def _fail(self, answer: Answer, error: ServeError) -> Reply:
        self.abort(answer.request.id)
        return failure_of(answer.request.id, error)


def refuse_beside_draft(sampling: Sampling) -> None:
    """Raises InvalidSampling for parameters that vLLM does not support with a draft."""
    for name in ("min_p", "logit_bias"):
        if getattr(sampling, name):
            error = InvalidSampling(
                f"{name} is not supported by this model, because vLLM serves it with a draft; leave "
                f"{name} out, or serve the model without a draft or with the engine transformers"
            )
            error.param = name
            raise error


def _structured_outputs(grammar: Grammar | None) -> Vllm | None:
    """Returns a grammar in the form of vLLM, whose backend `guidance` reads all three kinds."""
    if grammar is None:
        return None
    from vllm.sampling_params import StructuredOutputsParams

    name = {"json_schema": "json", "regex": "regex", "lark": "grammar"}[grammar.kind]
    return StructuredOutputsParams(**{name: grammar.text})


def _pick(token: int, logprobs: dict[int, Vllm] | None, request: GenerateRequest) -> SampledToken:
    """Returns the sampled token with its log-probabilities.

    vLLM reports the best tokens and the chosen one in one dictionary, each with its rank. A value
    of minus infinity becomes MIN_LOGPROB, as in vLLM's own server.
    """
    if logprobs is None:
        return SampledToken(token)
    ranked = sorted(logprobs.items(), key=lambda entry: entry[1].rank)
    values = {other: max(float(entry.logprob), MIN_LOGPROB) for other, entry in ranked}
    top = tuple(values.items())[: request.sampling.logprobs or 0]
    return SampledToken(token, values[token], top)


def _scores(choice: _Choice, logprobs: list[dict[int, Vllm] | None]) -> list[SampledToken]:
    """Returns the tokens of a prompt with their log-probabilities. The first token has none."""
    return [
        _pick(token, entries or None, choice.request)
        for token, entries in zip(choice.prompt, logprobs, strict=True)
    ]


def load_vllm(
    folder: Path,
    *,
    max_running: int,
    max_context_tokens: int,
    clock: Callable[[], float],
    draft: VllmDraft | None = None,
) -> tuple[VllmEngine, int]:
    """Returns an engine for the model of a folder, and the bytes of its weights and KV cache.

    The model runs in float32 on a CPU, and in the checkpoint's own dtype elsewhere. The build of
    vLLM determines the device. Raises OptionUnavailable, UnsupportedModel or ModelLoadFailed.
    """
    if not has_vllm():
        raise OptionUnavailable(
            'vLLM is not installed on this worker; install it with pip install "stillhouse[vllm]"'
        )
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    refuse_code(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadFailed(f"the model's files cannot be loaded: {error}") from error
    if config.model_type in SEQ2SEQ:
        raise UnsupportedModel(
            "vLLM only serves decoders; serve an encoder-decoder with the engine transformers"
        )
    limit = getattr(config, "max_position_embeddings", None) or max_context_tokens
    if draft is not None:
        refuse_code(draft.folder)
    core = make_core(
        folder,
        draft=draft,
        max_num_seqs=max_running,
        max_model_len=min(max_context_tokens, limit),
    )
    configs = [config]
    if (folder / "generation_config.json").exists():
        configs.append(GenerationConfig.from_pretrained(folder, local_files_only=True))
    engine = VllmEngine(
        core,
        tokenizer,
        end_ids=ends_named_in(configs, tokenizer),
        has_draft=draft is not None,
        clock=clock,
    )
    weights_bytes = sum(core.apply_model(lambda model: sum(w.nbytes for w in model.parameters())))
    if draft is not None:
        weights_bytes += sum(path.stat().st_size for path in draft.folder.glob("*.safetensors"))
    return engine, weights_bytes + core.vllm_config.cache_config.kv_cache_memory_bytes
