"""Validates generation requests, reserves capacity and passes them to the request router."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import orjson
from fastapi.concurrency import run_in_threadpool

from app.contracts.generation import GenerateRequest, Message, Sampling, TaskName, ToolUse
from app.db.schema.ids import new_id
from app.db.usage.records import Usage
from app.errors import BadRequest
from app.routing.reply_stream import ReplyStream, TokenCount
from app.routing.router import RequestRouter
from app.schemas.answers import ChatAnswer, TextAnswer
from app.schemas.completions import ChatBody, CompletionBody
from app.services import model_registry
from app.services.limits.meter import Meter
from app.services.model_registry import Resolved
from app.settings import Settings

BYTES_PER_TOKEN = 3  # a low estimate for English text, so that token counts are rather too high
MESSAGE_TOKENS = 8  # estimate of what a chat template adds per message
# Estimated bytes of JSON in an answer: per token of text, and per log-probability of a token or an
# alternative. The last number is how many bytes of log-probabilities admission control counts as
# one token.
TEXT_BYTES, LOGPROB_BYTES, LOGPROB_BYTES_PER_TOKEN = 8, 80, 256
PROMPT_AND_ANSWER = "prompt and answer together have"


@dataclass(frozen=True)
class Conversation:
    """A chat prompt, to which the model's chat template is applied.

    `template_kwargs` is JSON text of further variables for the template.
    """

    messages: tuple[Message, ...]
    tool_use: ToolUse | None = None
    template_kwargs: str = "{}"

    @property
    def shows_tools(self) -> bool:
        return self.tool_use is not None and self.tool_use.choice != "none"

    @property
    def has_calls(self) -> bool:
        return any(message.tool_calls or message.role == "tool" for message in self.messages)

    def texts(self) -> Iterator[str]:
        """Yields the texts that the model reads."""
        for message in self.messages:
            yield message.content or ""
            for call in message.tool_calls:
                yield call.name + call.arguments
        if self.shows_tools and self.tool_use is not None:
            for tool in self.tool_use.tools:
                yield tool.name + (tool.description or "") + (tool.parameters or "")


Prompt = str | tuple[int, ...] | Conversation


class WholeAnswer(Protocol):
    """Answer whose complete JSON is written in parts."""

    def whole(self) -> Iterator[bytes]: ...


@dataclass(frozen=True)
class Order:
    """One client request: prompts with one model and one set of sampling parameters.

    Workers serve tenants fairly. If `tenant` is empty, the API key `key_id` is the tenant.
    """

    id: str
    key_id: str
    model: Resolved
    prompts: Sequence[Prompt]
    num_choices: int
    sampling: Sampling
    tenant: str = ""
    is_streamed: bool = False
    task: TaskName = "generate"
    adds_special_tokens: bool = True

    @property
    def num_sequences(self) -> int:
        """Number of choices that are generated for each prompt."""
        return max(self.num_choices, self.sampling.best_of or 1)

    @cached_property
    def prompt_tokens(self) -> tuple[int, ...]:
        """Estimated tokens of each prompt. Kept, because large prompts take milliseconds."""
        return tuple(map(estimated_tokens, self.prompts))


async def begin(
    request_router: RequestRouter, order: Order, meter: Meter | None = None
) -> ReplyStream:
    """Reserves capacity and sends the prompts to serve workers.

    The capacity is given back when the reply stream ends, or if this call raises.

    meter: Counts the request against the limits of its key, and records its usage.

    Raises:
        BadRequest: The model does not support the request, or the answer may become too large.
        TooManyRequests: The tenant has used its share, or a limit is reached.
        Unavailable: The server is full, or no serve worker can take the prompts.
    """
    validate_for_model(order, request_router.settings)
    refuse_large_answer(order, request_router.settings.max_answer_bytes)
    num_tokens = sum(order.prompt_tokens)
    num_tokens += len(order.prompts) * order.num_sequences * order.sampling.max_tokens
    num_tokens += logprob_bytes(order) // LOGPROB_BYTES_PER_TOKEN
    give_back = request_router.admission.reserve(
        order.tenant or order.key_id, num_requests=len(order.prompts), num_tokens=num_tokens
    )

    def end(count: TokenCount) -> None:
        """Gives back what is reserved, and records the usage. Further calls have no effect."""
        give_back()
        if meter is not None:
            meter.settle(usage_of(order, count))

    try:
        if meter is not None:
            least, most = token_range(order, request_router.settings.max_context_tokens)
            await meter.reserve(most, least_tokens=least)
        requests = requests_of(order, request_router.settings)
        await asyncio.sleep(0)  # lets other coroutines run: both steps are slow for large prompts
        return await request_router.open(requests, end)
    except BaseException:
        end(TokenCount())
        raise


def token_range(order: Order, max_context_tokens: int) -> tuple[int, int]:
    """Returns the fewest and the most tokens that a rate limit has to admit for a request.

    They are the same if the request has a `max_tokens`. If it has none, its answers may be shorter
    than the context allows: the fewest are its prompts, by estimate, and one token per answer.
    """
    facts = order.model.facts
    context_tokens = min(facts.context_tokens, max_context_tokens) if facts else max_context_tokens
    least = most = 0
    for num_prompt_tokens in order.prompt_tokens:
        num_answer_tokens = order.sampling.max_tokens
        if order.sampling.fits_context:
            num_answer_tokens = min(num_answer_tokens, max(context_tokens - num_prompt_tokens, 1))
        num_needed_tokens = 1 if order.sampling.fits_context else num_answer_tokens
        least += num_prompt_tokens + order.num_sequences * num_needed_tokens
        most += num_prompt_tokens + order.num_sequences * num_answer_tokens
    return least, most


def usage_of(order: Order, count: TokenCount) -> Usage | None:
    """Returns the usage of a request that has ended, or None if no worker has begun to answer it.

    The prompts of an aborted or failed request are estimated unless they are tokens.
    """
    if not count.num_complete and not count.partial:
        return None
    num_estimated = sum(order.prompt_tokens[index] for index in count.partial)
    return Usage(
        order.model.model_id,
        count.num_input + num_estimated,
        count.num_cached,
        count.num_output + sum(count.partial.values()),
    )


def validate_for_model(order: Order, settings: Settings) -> None:
    """Raises BadRequest if the facts of the model rule out the request.

    Checks that need the tokenised prompt are left to the serve worker.
    """
    facts = order.model.facts
    if facts is None:
        return
    if facts.family == "masked":
        message = f"{order.model.model_id!r} is a {facts.architecture} model, which does not generate text; use it as a teacher"
        raise BadRequest(message, "model_not_servable", "model")
    if not facts.has_chat_template and any(
        isinstance(prompt, Conversation) for prompt in order.prompts
    ):
        message = f"the model {order.model.model_id!r} has no chat template; use /v1/completions"
        raise BadRequest(message, "no_chat_template", "messages")
    if facts.takes_tools is False:
        refuse_tools(order)
    if order.task != "generate":
        return
    context_tokens = min(facts.context_tokens, settings.max_context_tokens)
    longest = max((len(prompt) for prompt in order.prompts if isinstance(prompt, tuple)), default=0)
    if longest > context_tokens:
        raise BadRequest(
            f"the prompt has {longest:,} tokens, but this model takes at most {context_tokens:,}",
            "context_length_exceeded",
            "prompt",
        )
    # The prompt of an encoder-decoder is not part of the sequence that it generates.
    is_apart = facts.family == "seq2seq"
    if is_apart and order.sampling.echo:
        message = "echo is not supported by encoder-decoder models, whose answer does not continue the prompt; leave echo out"
        raise BadRequest(message, "unsupported_parameter", "echo")
    if order.sampling.max_tokens >= context_tokens + is_apart and not order.sampling.fits_context:
        raise BadRequest(
            f"max_tokens is {order.sampling.max_tokens}, but {'an answer has' if is_apart else PROMPT_AND_ANSWER} at most "
            f"{context_tokens} tokens with this model",
            "context_length_exceeded",
            "max_tokens",
        )


def refuse_tools(order: Order) -> None:
    """Raises BadRequest if a prompt has tools or tool calls, for a model without them."""
    for prompt in order.prompts:
        if isinstance(prompt, Conversation) and (prompt.shows_tools or prompt.has_calls):
            param = "tools" if prompt.shows_tools else "messages"
            message = (
                f"the chat template of the model {order.model.model_id!r} does not support tools; "
                "leave tools and tool calls out, or use another model"
            )
            raise BadRequest(message, "tools_unsupported", param)


def logprob_bytes(order: Order) -> int:
    """Returns the estimated bytes of JSON of the log-probabilities that are in memory at one time.

    Those of an echoed prompt are sent in one piece for each choice, even if the answer is streamed.
    Of a streamed answer, the others are not kept.
    """
    if order.sampling.logprobs is None:
        return 0
    num_entries = 0
    if order.sampling.scores_prompt:
        num_entries += sum(order.prompt_tokens) * order.num_sequences
    if not order.is_streamed:
        num_entries += len(order.prompts) * order.sampling.max_tokens * order.num_sequences
    return num_entries * LOGPROB_BYTES * (1 + order.sampling.logprobs)


def refuse_large_answer(order: Order, max_bytes: int) -> None:
    """Raises BadRequest if the answer to a request may have more than `max_bytes`.

    Of a streamed answer only the echoed prompt and its log-probabilities count: they are sent in one
    piece, and the rest is not kept in memory.
    """
    num_bytes = logprob_bytes(order)
    if order.sampling.echo:
        num_bytes += BYTES_PER_TOKEN * sum(order.prompt_tokens) * order.num_choices
    if not order.is_streamed:
        num_tokens = len(order.prompts) * order.num_choices * order.sampling.max_tokens
        num_bytes += num_tokens * TEXT_BYTES
    if num_bytes <= max_bytes:
        return
    is_chat = isinstance(order.prompts[0], Conversation)
    name = "top_logprobs" if is_chat else "logprobs"
    param = name if order.sampling.logprobs is not None else "echo" if order.sampling.echo else "n"
    reducible = f"n, max_tokens, {name}" if is_chat else f"n, best_of, max_tokens, {name}, echo"
    raise BadRequest(
        f"the answer may have {num_bytes:,} bytes, at most {max_bytes:,} are allowed; reduce {reducible} "
        f"or the number of prompts{'' if order.is_streamed else ', or stream the answer'}",
        "answer_too_large",
        param,
    )


async def whole_json(answer: WholeAnswer) -> list[bytes]:
    """Returns the JSON of a complete answer in parts.

    Other coroutines run between two parts, so that a large answer does not block the event loop.
    """
    parts = []
    for part in answer.whole():
        parts.append(part)
        await asyncio.sleep(0)
    return parts


def requests_of(order: Order, settings: Settings) -> list[GenerateRequest]:
    """Returns one request per prompt. The request router replaces `id` and fills in `reply_to`."""
    deadline_at = time.time() + settings.request_timeout_seconds
    return [
        GenerateRequest(
            id=f"{order.id}-{number}",
            task=order.task,
            reply_to="",
            tenant=order.tenant or order.key_id,
            model=order.model.model_id,
            weights=order.model.ref,
            serving=order.model.serving,
            text=prompt if isinstance(prompt, str) else None,
            tokens=prompt if isinstance(prompt, tuple) else None,
            **_chat_fields(prompt),
            n=order.num_choices,
            sampling=order.sampling,
            deadline_at=deadline_at,
            adds_special_tokens=order.adds_special_tokens,
        )
        for number, prompt in enumerate(order.prompts)
    ]


def _chat_fields(prompt: Prompt) -> dict[str, Any]:  # Any: fields of several types
    if not isinstance(prompt, Conversation):
        return {}
    return {
        "messages": prompt.messages,
        "tool_use": prompt.tool_use,
        "template_kwargs": prompt.template_kwargs,
    }


async def find_model(project_id: str, model_id: str) -> Resolved:
    """Returns what a model id, alias or checkpoint of a project refers to now. Raises NotFound."""
    return await run_in_threadpool(model_registry.resolve_at_once, project_id, model_id)


def estimated_tokens(prompt: Prompt) -> int:
    """Returns the number of tokens of a prompt, estimated without tokenising text."""
    if isinstance(prompt, str):
        return len(prompt.encode()) // BYTES_PER_TOKEN + 1
    if isinstance(prompt, tuple):
        return len(prompt)
    return sum(estimated_tokens(text) + MESSAGE_TOKENS for text in prompt.texts())


def begin_answer(body: ChatBody | CompletionBody) -> tuple[ChatAnswer | TextAnswer, list[Prompt]]:
    """Returns an empty answer for a request body, and the prompts of the body."""
    created = int(time.time())
    if isinstance(body, CompletionBody):
        return TextAnswer(new_id("cmpl-"), body, created=created), list(body.prompts)
    conversation = Conversation(
        tuple(message.message() for message in body.messages),
        body.tool_use(),
        orjson.dumps(body.chat_template_kwargs or {}).decode(),
    )
    return ChatAnswer(new_id("chatcmpl-"), body, created=created), [conversation]


def has_schemas(body: ChatBody | CompletionBody) -> bool:
    """Returns whether `refuse_unsupported` has to check schemas, which may take milliseconds."""
    if body.response_format is not None or body.structured_outputs is not None:
        return True
    return isinstance(body, ChatBody) and any(tool.function.strict for tool in body.tools or ())


def refuse_unsupported(body: ChatBody | CompletionBody) -> None:
    """Raises BadRequest if the body sets a parameter that this service does not support.

    The messages, the tools and the grammar of the answer are checked too.
    """
    if (name := body.unsupported()) is not None:
        raise BadRequest(f"{name} is not supported; leave it out", "unsupported_parameter", name)
    if isinstance(body, ChatBody):
        body.check()
    if isinstance(body, CompletionBody) and body.max_tokens == 0 and not body.echo:
        message = "max_tokens must be at least 1, unless echo is true"
        raise BadRequest(message, param="max_tokens")
    _ = body.grammar  # raises BadRequest
