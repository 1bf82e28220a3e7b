"""Replies to requests about the tokenizer of a model: tokens, text, and special tokens."""

import json
from typing import Any

from app.contracts.generation import Delta, Done, GenerateRequest, Reply
from worker.serve.decoding.families import Context
from worker.serve.errors import InvalidTokens, raise_unless_panic
from worker.serve.text.prompts import encode, prompt_tokens

DELTA_TOKENS = 1024  # an API process parses a delta in its event loop
UNLIMITED = Context(2**31)
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def tokenizer_replies(
    request: GenerateRequest,
    tokenizer: Any,  # transformers is untyped here
    *,
    vocab_size: int,
) -> tuple[Reply, ...]:
    """Returns the replies to a request whose task is not `generate`. Raises ServeError."""
    text, tokens = "", request.tokens or ()
    if request.task == "tokenize":
        tokens = _tokens(request, tokenizer, vocab_size=vocab_size)
    elif request.task == "detokenize":
        text = _text(tokens, tokenizer, vocab_size=vocab_size)
    else:
        text = _description(tokenizer)
    shown = tokens if request.task == "tokenize" else ()
    parts = [shown[at : at + DELTA_TOKENS] for at in range(0, len(shown), DELTA_TOKENS)]
    deltas = [Delta(id=request.id, choice=0, text="", tokens=part) for part in parts]
    last = Delta(id=request.id, choice=0, text=text, finish_reason="stop")
    return *deltas, last, Done(id=request.id, prompt_tokens=len(tokens), completion_tokens=0)


def _tokens(
    request: GenerateRequest,
    tokenizer: Any,  # transformers is untyped here
    *,
    vocab_size: int,
) -> tuple[int, ...]:
    if request.messages is not None:
        return prompt_tokens(request, tokenizer, vocab_size=vocab_size, context=UNLIMITED)
    adds = request.adds_special_tokens
    return encode(request.text or "", tokenizer, add_special_tokens=adds)


def _text(tokens: tuple[int, ...], tokenizer: Any, *, vocab_size: int) -> str:
    unknown = [token for token in tokens if not 0 <= token < vocab_size]
    if unknown:
        raise InvalidTokens(
            f"token {unknown[0]} is not in the vocabulary; give tokens from 0 to {vocab_size - 1}"
        )
    try:
        return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))
    except BaseException as error:
        raise_unless_panic(error)
        raise InvalidTokens(
            "the model's tokenizer cannot decode these tokens; give other tokens"
        ) from error


def _description(tokenizer: Any) -> str:
    """Returns the special tokens and the chat template as JSON, with null for those it lacks."""
    named = {name: getattr(tokenizer, name, None) for name in NAMES}
    described = {name: None if token is None else str(token) for name, token in named.items()}
    template = tokenizer.chat_template
    described["tokenizer_class"] = type(tokenizer).__name__
    return json.dumps(
        described | {"chat_template": template if isinstance(template, str) else None}
    )
