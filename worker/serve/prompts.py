"""Turns what a request carries (text, tokens or messages) into prompt tokens that fit the context."""

from typing import Any

from jinja2.exceptions import TemplateError

from app.contracts import GenerateRequest, Message
from worker.serve.errors import InvalidMessages, InvalidPrompt, MessagesTooLong, NoChatTemplate, PromptTooLong

Tokenizer = Any  # transformers is untyped here


def prompt_tokens(
    request: GenerateRequest, tokenizer: Tokenizer, *, vocab_size: int, context_tokens: int
) -> tuple[int, ...]:
    """Tokens that leave room for max_tokens, or for one if the request takes what fits.

    Raises InvalidPrompt, InvalidMessages, NoChatTemplate or PromptTooLong.
    """
    if request.messages is not None:
        tokens = chat_tokens(request.messages, tokenizer)
    elif request.tokens is not None:
        tokens = request.tokens
    else:
        tokens = tuple(tokenizer(request.text or "").input_ids)
    if not tokens:
        tokens = _start_token(tokenizer)
    unknown = [token for token in tokens if not 0 <= token < vocab_size]
    if unknown:
        raise InvalidPrompt(
            f"token {unknown[0]} is not in the vocabulary; give tokens from 0 to {vocab_size - 1}"
        )
    num_answer = 1 if request.sampling.fits_context else request.sampling.max_tokens
    if len(tokens) + num_answer > context_tokens:
        raise (PromptTooLong if request.messages is None else MessagesTooLong)(
            f"This model's maximum context length is {context_tokens} tokens, but {len(tokens) + num_answer} "
            f"were asked for ({len(tokens)} in the prompt, {num_answer} for the answer); "
            "shorten the prompt or lower max_tokens"
        )
    return tokens


def chat_tokens(messages: tuple[Message, ...], tokenizer: Tokenizer) -> tuple[int, ...]:
    """The chat template's rendering with the assistant's turn opened.

    The template comes with the model, so it is untrusted: transformers renders it in an immutable sandbox.
    """
    template = tokenizer.chat_template
    if not template:
        raise NoChatTemplate("this model has no chat template; use /v1/completions")
    turns = [{"role": message.role, "content": message.content} for message in messages]
    if "developer" not in str(template):
        turns = [turn | {"role": "system"} if turn["role"] == "developer" else turn for turn in turns]
    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise InvalidMessages(f"the model's chat template refuses these messages: {error}") from error
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def _start_token(tokenizer: Tokenizer) -> tuple[int, ...]:
    if tokenizer.bos_token_id is None:
        raise InvalidPrompt("the prompt is empty and this model has no start token; give at least one token")
    return (tokenizer.bos_token_id,)
