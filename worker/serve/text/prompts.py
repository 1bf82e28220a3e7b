"""Converts the text, tokens or messages of a request into prompt tokens that fit the context."""

from typing import Any

from app.contracts.generation import GenerateRequest
from worker.serve.decoding.families import Context
from worker.serve.errors import (
    AnswerTooLong,
    InvalidPrompt,
    MessagesTooLong,
    PromptTooLong,
    raise_unless_panic,
)
from worker.serve.text.chat_prompts import chat_text
from worker.serve.text.prompt_size import SizeBound

Tokenizer = Any  # transformers is untyped here

# Texts up to this length are always tokenised, so that an error can state the exact numbers.
SHORT_CHARACTERS = 16_384


def prompt_tokens(
    request: GenerateRequest,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    context: Context,
    bound: SizeBound | None = None,
) -> tuple[int, ...]:
    """Returns the prompt tokens of a request.

    An empty prompt becomes the start token. A prompt that does not leave room for `max_tokens`
    tokens is refused, never shortened. With `fits_context`, room for one token suffices. A long text that cannot fit by its size bound is
    refused before it is tokenised.

    Raises:
        InvalidPrompt: The prompt cannot be tokenised, has an unknown token, or is empty while the
            model has no start token.
        InvalidMessages: The chat template cannot render the messages.
        NoChatTemplate: The request has messages, but the model has no chat template.
        ToolsUnsupported: The request has tools, but the chat template does not show them.
        PromptTooLong: The prompt and the answer do not fit the context.
        MessagesTooLong: The same for a chat.
        AnswerTooLong: `max_tokens` exceeds the decoder context of an encoder-decoder.
    """
    tokens = request.tokens
    if tokens is None:
        is_chat = request.messages is not None
        text = chat_text(request, tokenizer) if is_chat else request.text or ""
        if bound is not None and len(text) > SHORT_CHARACTERS:
            refuse_too_long(request, bound.least_tokens(text), context, is_least=True)
        if is_chat:
            tokens = encode(text, tokenizer, add_special_tokens=False)
        else:
            tokens = text_tokens(text, tokenizer, has_encoder=context.source_tokens is not None)
    if not tokens:
        tokens = _start_token(tokenizer)
    refuse_too_long(request, len(tokens), context)
    unknown = [token for token in tokens if not 0 <= token < vocab_size]
    if unknown:
        raise InvalidPrompt(
            f"token {unknown[0]} is not in the vocabulary; give tokens from 0 to {vocab_size - 1}"
        )
    return tokens


def refuse_too_long(
    request: GenerateRequest, num_prompt: int, context: Context, *, is_least: bool = False
) -> None:
    """Raises an error if the prompt and the answer do not fit the context.

    It is PromptTooLong, for chats MessagesTooLong, or AnswerTooLong.

    With `is_least`, `num_prompt` is a lower bound on the number of prompt tokens.
    """
    num_answer = 1 if request.sampling.fits_context else request.sampling.max_tokens
    if num_answer <= context.room_for(num_prompt):
        return
    error = MessagesTooLong if request.messages is not None else PromptTooLong
    bound = "at least " if is_least else ""
    if context.source_tokens is None:
        raise error(
            f"This model's maximum context length is {context.tokens} tokens, but {bound}"
            f"{num_prompt + num_answer} were asked for ({bound}{num_prompt} in the prompt, {num_answer} for the "
            "answer); shorten the prompt or lower max_tokens"
        )
    if num_prompt > context.source_tokens:
        raise error(
            f"This model's encoder reads at most {context.source_tokens} tokens, but the prompt has {bound}"
            f"{num_prompt}; shorten it"
        )
    raise AnswerTooLong(
        f"This model's answers have at most {context.tokens} tokens, but max_tokens is {num_answer}; lower it"
    )


def text_tokens(text: str, tokenizer: Tokenizer, *, has_encoder: bool) -> tuple[int, ...]:
    """Returns the tokens of a text prompt, in the form that students are trained on.

    The tokens include those that the tokenizer adds. Trailing end tokens are removed, because a
    model would take them for the end of the answer. They stay if an encoder reads the prompt, or if
    the end token is also the separator.
    """
    tokens = list(encode(text, tokenizer))
    end = end_id_of(tokenizer)
    if not has_encoder and end != tokenizer.sep_token_id:
        while tokens and tokens[-1] == end:
            tokens.pop()
    return tuple(tokens)


def end_id_of(tokenizer: Tokenizer) -> int | None:
    """Returns the token that ends an answer, or None if there is none.

    The tokenizers of BERT have no end token. Their separator is used instead.
    """
    end: int | None = getattr(tokenizer, "eos_token_id", None)
    return getattr(tokenizer, "sep_token_id", None) if end is None else end


def encode(text: str, tokenizer: Tokenizer, *, add_special_tokens: bool = True) -> tuple[int, ...]:
    """Returns the tokens of a text. Raises InvalidPrompt if the tokenizer fails on it."""
    try:
        return tuple(tokenizer(text, add_special_tokens=add_special_tokens).input_ids)
    except BaseException as error:
        raise_unless_panic(error)
        raise InvalidPrompt(
            "the model's tokenizer cannot tokenise this text; change the text"
        ) from error


def _start_token(tokenizer: Tokenizer) -> tuple[int, ...]:
    if tokenizer.bos_token_id is None:
        raise InvalidPrompt(
            "the prompt is empty and this model has no start token; give at least one token"
        )
    return (tokenizer.bos_token_id,)
