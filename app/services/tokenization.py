"""Requests to serve workers about the tokenizer of a model, which they load with the model."""

from dataclasses import dataclass
from typing import Literal

from app.contracts.generation import Delta, Sampling
from app.db.schema.ids import new_id
from app.routing.router import RequestRouter
from app.services import generation
from app.services.generation import Order, Prompt
from app.services.model_registry import Resolved

Task = Literal["tokenize", "detokenize", "describe_tokenizer"]


@dataclass(frozen=True)
class TokenizerReply:
    """Reply of a worker: the tokens of a text, or a text."""

    text: str
    tokens: list[int]


async def ask(
    request_router: RequestRouter,
    key_id: str,
    model: Resolved,
    *,
    task: Task,
    prompt: Prompt,
    adds_special_tokens: bool = True,
) -> TokenizerReply:
    """Sends a request about the tokenizer to a serve worker, and returns its reply.

    Raises as `generation.begin` does.
    """
    order = Order(
        new_id("tok-"),
        key_id,
        model,
        [prompt],
        1,
        Sampling(max_tokens=0),
        task=task,
        adds_special_tokens=adds_special_tokens,
    )
    reply_stream = await generation.begin(request_router, order)
    text: list[str] = []
    tokens: list[int] = []
    try:
        while replies := await reply_stream.take():
            deltas = [reply for _, reply in replies if isinstance(reply, Delta)]
            text += [delta.text for delta in deltas]
            for delta in deltas:
                tokens += delta.tokens
    except BaseException:
        reply_stream.close()
        raise
    return TokenizerReply("".join(text), tokens)
