"""Routes about the tokenizer of a model, at the root of the server as in vLLM.

lm-evaluation-harness uses them. It does not name a model, so the model may be left out if the
project has only one.
"""

from typing import Annotated

import orjson
from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from app.api.completions import AdmissionRoute, Caller
from app.errors import BadRequest
from app.routing.router import RequestRouter
from app.schemas.models import usable_context
from app.schemas.responses.body import PromptBody
from app.schemas.tokenizers import (
    DetokenizeBody,
    InputTokens,
    TokenizeBody,
    TokenizedText,
    TokenizerInfo,
    Tokens,
)
from app.services import generation, model_registry, tokenization
from app.services.generation import Conversation, Prompt

router = APIRouter(tags=["generation"], route_class=AdmissionRoute)


@router.get("/tokenizer_info", responses={200: {"model": TokenizerInfo}})
async def get_tokenizer_info(
    request: Request,
    caller: Caller,
    model: Annotated[str | None, Query(max_length=200)] = None,
) -> Response:
    """Returns the special tokens and the chat template of a model."""
    resolved = await run_in_threadpool(model_registry.resolve_or_only, caller.project_id, model)
    reply = await tokenization.ask(
        _router(request), caller.key_id, resolved, task="describe_tokenizer", prompt=""
    )
    return Response(reply.text, media_type="application/json")


@router.post("/tokenize", responses={200: {"model": Tokens}})
async def tokenize(body: TokenizeBody, request: Request, caller: Caller) -> Response:
    """Returns the tokens of a text or of a chat."""
    resolved = await run_in_threadpool(
        model_registry.resolve_or_only, caller.project_id, body.model
    )
    prompt: Prompt = body.prompt or ""
    if body.messages is not None:
        prompt = Conversation(tuple(message.message() for message in body.messages))
    reply = await tokenization.ask(
        _router(request),
        caller.key_id,
        resolved,
        task="tokenize",
        prompt=prompt,
        adds_special_tokens=body.add_special_tokens,
    )
    content = {
        "count": len(reply.tokens),
        "max_model_len": resolved.facts and usable_context(resolved.facts),
        "tokens": reply.tokens,
    }
    return Response(orjson.dumps(content), media_type="application/json")


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, request: Request, caller: Caller) -> TokenizedText:
    """Returns the text of tokens, including special tokens."""
    resolved = await run_in_threadpool(
        model_registry.resolve_or_only, caller.project_id, body.model
    )
    reply = await tokenization.ask(
        _router(request), caller.key_id, resolved, task="detokenize", prompt=tuple(body.tokens)
    )
    return TokenizedText(prompt=reply.text)


@router.post("/v1/responses/input_tokens")
async def count_input_tokens(body: PromptBody, request: Request, caller: Caller) -> InputTokens:
    """Returns the number of tokens that a response to this input would read."""
    body.refuse_state()
    try:
        chat = body.chat()
        await run_in_threadpool(generation.refuse_unsupported, chat)
        _, [prompt] = generation.begin_answer(chat)
        resolved = await generation.find_model(caller.project_id, body.model)
        reply = await tokenization.ask(
            _router(request), caller.key_id, resolved, task="tokenize", prompt=prompt
        )
    except BadRequest as error:
        raise body.renamed(error) from None
    return InputTokens(input_tokens=len(reply.tokens))


def _router(request: Request) -> RequestRouter:
    request_router: RequestRouter = request.app.state.request_router
    return request_router
