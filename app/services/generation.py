"""Generation requests: which model they mean, whether there is room for them, and who answers them."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi.concurrency import run_in_threadpool

from app.contracts.messages import GenerateRequest, Message, Sampling
from app.db.schema.ids import new_id
from app.errors import BadRequest
from app.routing.reply_stream import ReplyStream
from app.routing.router import RequestRouter
from app.schemas.answers import ChatAnswer, TextAnswer
from app.schemas.completions import ChatBody, CompletionBody
from app.services import model_registry
from app.services.model_registry import Resolved
from app.settings import Settings

BYTES_PER_TOKEN = 3  # on the safe side for English text in the tokenizers we know
MESSAGE_TOKENS = 8  # what a chat template puts around one message, about
# Of an answer's JSON, about: per token of text, per token or alternative with its log-probability, and the
# bytes of log-probabilities that take as much room in the admission as a token.
TEXT_BYTES, LOGPROB_BYTES, LOGPROB_BYTES_PER_TOKEN = 8, 80, 256
PROMPT_AND_ANSWER = "prompt and answer together have"


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]


Prompt = str | tuple[int, ...] | Conversation


@dataclass(frozen=True)
class Order:
    """One client request: the same model and sampling for all its prompts.

    Workers serve tenants fairly. The tenant is the API key unless another one is named.
    """

    id: str
    key_id: str
    model: Resolved
    prompts: Sequence[Prompt]
    num_choices: int
    sampling: Sampling
    tenant: str = ""
    is_streamed: bool = False


async def begin(request_router: RequestRouter, order: Order) -> ReplyStream:
    """Reserves room and hands the prompts to workers. Raises BadRequest, TooManyRequests or Unavailable."""
    validate_for_model(order, request_router.settings)
    refuse_large_answer(order, request_router.settings.max_answer_bytes)
    num_tokens = sum(map(estimated_tokens, order.prompts))
    num_written = max(order.num_choices, order.sampling.best_of or 1)
    num_tokens += len(order.prompts) * num_written * order.sampling.max_tokens
    if not order.is_streamed:
        num_tokens += logprob_bytes(order) // LOGPROB_BYTES_PER_TOKEN
    give_back = request_router.admission.reserve(
        order.tenant or order.key_id, num_requests=len(order.prompts), num_tokens=num_tokens
    )
    try:
        requests = requests_of(order, request_router.settings)
        await asyncio.sleep(0)  # building and sending large prompts takes milliseconds each
        return await request_router.open(requests, give_back)
    except BaseException:
        give_back()
        raise


def validate_for_model(order: Order, settings: Settings) -> None:
    """Refuses what the model's facts alone rule out; the worker, which tokenises, judges the rest."""
    facts = order.model.facts
    if facts is None:
        return
    if facts.family == "masked":
        message = f"{order.model.model_id!r} is a {facts.architecture} model, which writes no text; it can be a teacher"
        raise BadRequest(message, "model_not_servable", "model")
    if not facts.has_chat_template and any(
        isinstance(prompt, Conversation) for prompt in order.prompts
    ):
        message = f"the model {order.model.model_id!r} has no chat template; use /v1/completions"
        raise BadRequest(message, "no_chat_template", "messages")
    context_tokens = min(facts.context_tokens, settings.max_context_tokens)
    longest = max((len(prompt) for prompt in order.prompts if isinstance(prompt, tuple)), default=0)
    if longest > context_tokens:
        raise BadRequest(
            f"the prompt has {longest:,} tokens, but this model takes at most {context_tokens:,}",
            "context_length_exceeded",
            "prompt",
        )
    # An encoder-decoder's prompt is not part of the sequence that it writes.
    is_apart = facts.family == "seq2seq"
    if order.sampling.max_tokens >= context_tokens + is_apart and not order.sampling.fits_context:
        raise BadRequest(
            f"max_tokens is {order.sampling.max_tokens}, but {'an answer has' if is_apart else PROMPT_AND_ANSWER} at most "
            f"{context_tokens} tokens with this model",
            "context_length_exceeded",
            "max_tokens",
        )


def logprob_bytes(order: Order) -> int:
    """About how many bytes of JSON the log-probabilities of the answer may have."""
    if order.sampling.logprobs is None:
        return 0
    num_tokens = len(order.prompts) * order.num_choices * order.sampling.max_tokens
    return num_tokens * LOGPROB_BYTES * (1 + order.sampling.logprobs)


def refuse_large_answer(order: Order, max_bytes: int) -> None:
    """Refuses a request whose answer may become too large, before anything of it is built.

    A stream keeps nothing of its answer, but an echoed prompt comes in one piece.
    """
    num_bytes = 0
    if order.sampling.echo:
        num_bytes += BYTES_PER_TOKEN * sum(map(estimated_tokens, order.prompts)) * order.num_choices
    if not order.is_streamed:
        num_tokens = len(order.prompts) * order.num_choices * order.sampling.max_tokens
        num_bytes += num_tokens * TEXT_BYTES + logprob_bytes(order)
    if num_bytes <= max_bytes:
        return
    is_chat = isinstance(order.prompts[0], Conversation)
    name = "top_logprobs" if is_chat else "logprobs"
    param = name if order.sampling.logprobs is not None else "echo" if order.sampling.echo else "n"
    raise BadRequest(
        f"the answer may have {num_bytes:,} bytes, at most {max_bytes:,} are allowed; reduce n, max_tokens, "
        f"{name}{'' if is_chat else ', echo'} or the number of prompts, or stream the answer",
        "answer_too_large",
        param,
    )


async def whole_json(answer: ChatAnswer | TextAnswer) -> list[bytes]:
    """The JSON of a whole answer in parts, built with a turn for other coroutines between two of them."""
    parts = []
    for part in answer.whole():
        parts.append(part)
        await asyncio.sleep(0)
    return parts


def requests_of(order: Order, settings: Settings) -> list[GenerateRequest]:
    """One request for each prompt; the switchboard fills in who replies go to."""
    deadline_at = time.time() + settings.request_timeout_seconds
    return [
        GenerateRequest(
            id=f"{order.id}-{number}",
            reply_to="",
            tenant=order.tenant or order.key_id,
            model=order.model.model_id,
            weights=order.model.ref,
            serving=order.model.serving,
            text=prompt if isinstance(prompt, str) else None,
            tokens=prompt if isinstance(prompt, tuple) else None,
            messages=prompt.messages if isinstance(prompt, Conversation) else None,
            n=order.num_choices,
            sampling=order.sampling,
            deadline_at=deadline_at,
        )
        for number, prompt in enumerate(order.prompts)
    ]


async def find_model(project_id: str, model_id: str) -> Resolved:
    """What a model id means to a project now. Raises NotFound."""
    return await run_in_threadpool(model_registry.resolve_at_once, project_id, model_id)


def estimated_tokens(prompt: Prompt) -> int:
    """About how many tokens a prompt has, without tokenising it."""
    if isinstance(prompt, str):
        return len(prompt.encode()) // BYTES_PER_TOKEN + 1
    if isinstance(prompt, tuple):
        return len(prompt)
    return sum(estimated_tokens(message.content) + MESSAGE_TOKENS for message in prompt.messages)


def begin_answer(body: ChatBody | CompletionBody) -> tuple[ChatAnswer | TextAnswer, list[Prompt]]:
    """An answer to the body, empty yet, and what it answers."""
    created = int(time.time())
    if isinstance(body, CompletionBody):
        return TextAnswer(new_id("cmpl-"), body, created=created), list(body.prompts)
    conversation = Conversation(tuple(message.message() for message in body.messages))
    return ChatAnswer(new_id("chatcmpl-"), body, created=created), [conversation]


def refuse_unsupported(body: ChatBody | CompletionBody) -> None:
    """Raises BadRequest if the body asks for something this service cannot do."""
    if (name := body.unsupported()) is not None:
        raise BadRequest(f"{name} is not supported; leave it out", "unsupported_parameter", name)
