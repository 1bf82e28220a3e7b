"""Bytes that each token of a vocabulary adds to a text, for all kinds of tokenizers."""

from dataclasses import dataclass
from typing import Final

from worker.serve.text.detokenizer import REPLACEMENT, TokenText

PIECE_TOKENS: Final = 4096  # decoded in one call, which releases the GIL


@dataclass(frozen=True)
class TokenBytes:
    """Bytes of the tokens of a vocabulary. A token without bytes has no text.

    first: Bytes of the tokens at the beginning of a text, if they differ there. Some decoders drop
        the leading space of a text.
    """

    later: list[bytes]
    first: list[bytes] | None


def token_bytes(text: TokenText, num_tokens: int) -> TokenBytes:
    """Returns the bytes of the tokens 0 … num_tokens - 1. Special tokens have none."""
    if text.is_byte_level:
        return TokenBytes(_byte_level(text, num_tokens), None)
    context = _plain_token(text, num_tokens)
    beginning = text.decode([context])
    first, later = [], []
    for begin in range(0, num_tokens, PIECE_TOKENS):
        tokens = range(begin, min(begin + PIECE_TOKENS, num_tokens))
        alone = text.decode_each([[token] for token in tokens])
        after = text.decode_each([[context, token] for token in tokens])
        for token, single, pair in zip(tokens, alone, after, strict=True):
            first.append(_bytes_or_fallback(text, token, single))
            later.append(_bytes_or_fallback(text, token, pair.removeprefix(beginning)))
    return TokenBytes(later, None if first == later else first)


def _bytes_or_fallback(text: TokenText, token: int, string: str) -> bytes:
    """Returns the bytes of a decoded token, or those of the token itself if they are incomplete."""
    return text.bytes_of(token) if REPLACEMENT in string else string.encode(errors="replace")


def _byte_level(text: TokenText, num_tokens: int) -> list[bytes]:
    silent = text.silent_tokens()
    return [b"" if token in silent else text.bytes_of(token) for token in range(num_tokens)]


def _plain_token(text: TokenText, num_tokens: int) -> int:
    """Returns a token after which other tokens decode as in the middle of a text."""
    for begin in range(0, num_tokens, PIECE_TOKENS):
        tokens = range(begin, min(begin + PIECE_TOKENS, num_tokens))
        for token, string in zip(tokens, text.decode_each([[t] for t in tokens]), strict=True):
            if _is_plain(string):
                return token
    raise ValueError("the vocabulary has no token of letters")


def _is_plain(string: str) -> bool:
    return len(string) > 0 and string.isascii() and string.isalpha()
