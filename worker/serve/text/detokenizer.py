"""Incremental detokeniser that releases only text that can no longer change.

It holds back incomplete characters, and text that may be the beginning of a stop string.
"""

import copy
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from app.contracts.generation import TokenLogprob
from worker.serve.decoding.sampling import SampledToken
from worker.serve.errors import ServeError, raise_unless_panic
from worker.serve.text.tools.formats import tool_format_of

# Decoders return this character for bytes that are not, or not yet, a complete character.
REPLACEMENT = "\ufffd"
# Tokens that are decoded again before new ones, so that a new word keeps its leading space.
NUM_CONTEXT_TOKENS = 4


class TokenText:
    """Converts tokens to text and to bytes with one tokenizer.

    `tool_format` is the format in which the model of the tokenizer writes tool calls.
    `special_tokens` has the ids of the special tokens by their texts.
    """

    def __init__(self, tokenizer: Any) -> None:  # Any: transformers is untyped here
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str())["decoder"] if backend is not None else None
        self._backend = backend
        self.is_byte_level = '"ByteLevel"' in json.dumps(decoder)
        self._bytes_of_letter = BYTE_OF_LETTER if self.is_byte_level else {}
        added_tokens = tokenizer.added_tokens_decoder
        self._added = {token: str(added) for token, added in added_tokens.items()}
        self.special_tokens = {str(a): token for token, a in added_tokens.items() if a.special}
        self._hidden: frozenset[int] | None = None  # None: all special tokens
        self.tool_format = tool_format_of(tokenizer)

    def showing(self, texts: Collection[str]) -> "TokenText":
        """Returns a copy that decodes the special tokens with these texts as other tokens."""
        shown = copy.copy(self)
        shown._hidden = frozenset(
            token for name, token in self.special_tokens.items() if name not in texts
        )
        return shown

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens, with all spaces and without hidden special tokens.

        Raises ServeError if the tokenizer fails.
        """
        kept = list(tokens)
        if self._hidden is not None:
            kept = [token for token in kept if token not in self._hidden]
        try:
            text: str = self._tokenizer.decode(
                kept,
                skip_special_tokens=self._hidden is None,
                clean_up_tokenization_spaces=False,
            )
        except BaseException as error:
            raise_unless_panic(error)
            raise ServeError("the model's tokenizer cannot decode its own tokens") from error
        return text

    def decode_each(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Returns the text of each sequence of tokens, without special tokens.

        Fast tokenizers release the GIL.
        """
        if self._backend is None:
            return [self.decode(tokens) for tokens in sequences]
        decoded: list[str] = self._backend.decode_batch(
            [list(tokens) for tokens in sequences], skip_special_tokens=True
        )
        return decoded

    def silent_tokens(self) -> frozenset[int]:
        """Returns the special tokens, which `decode` leaves out."""
        return frozenset(token for token in self._added if not self.decode([token]))

    def window_after(self, prompt: Sequence[int]) -> list[int]:
        """Returns the last tokens of a prompt, after which the text of an answer is decoded."""
        tail = list(prompt[-NUM_CONTEXT_TOKENS:])
        return [] if self.decode(tail).endswith(REPLACEMENT) else tail

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a part of an answer."""
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return tokens

    def bytes_of(self, token: int) -> bytes:
        """Returns the bytes of one token, which may be an incomplete character."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""  # a padded vocabulary has ids without a token
        if self._bytes_of_letter and all(letter in self._bytes_of_letter for letter in piece):
            return bytes(self._bytes_of_letter[letter] for letter in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("▁", " ").encode()  # SentencePiece writes a space as ▁

    def logprob_of(self, pick: SampledToken) -> TokenLogprob | None:
        """Returns the log-probabilities of a token in the form of the API, if it has any."""
        return None if pick.logprob is None else self.entry_of(pick)

    def entry_of(self, pick: SampledToken) -> TokenLogprob | None:
        """Returns a token in the form of the API, with or without log-probabilities."""
        if pick.token is None:
            return None
        data = self.bytes_of(pick.token)
        return TokenLogprob(
            token=data.decode(errors="replace"),
            logprob=pick.logprob,
            bytes=tuple(data),
            top=tuple((self.bytes_of(t).decode(errors="replace"), value) for t, value in pick.top),
        )


def _byte_level_letters() -> dict[str, int]:
    # GPT-2's byte alphabet: printable Latin-1 bytes map to themselves, the others to U+0100 and up
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}


BYTE_OF_LETTER = _byte_level_letters()


@dataclass(frozen=True)
class TextChunk:
    """Text that can no longer change, and the sampled tokens whose text it contains.

    A chunk with `is_stopped` is the last one: its text ends before a stop string.
    """

    text: str = ""
    picks: tuple[SampledToken, ...] = ()
    is_stopped: bool = False


@dataclass
class _Placed:
    pick: SampledToken
    begin: int
    end: int


class TextStream:
    """Text of one choice, released while its tokens arrive.

    Positions count characters from the start of the answer. Stop strings are searched only in the
    text after the first `min_tokens` tokens.
    """

    def __init__(
        self,
        text: TokenText,
        *,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        min_tokens: int = 0,
    ) -> None:
        self._codec = text
        self._stop = tuple(string for string in stop if string)
        self._num_unstoppable = min_tokens
        self._window = text.window_after(prompt)
        self._num_read = len(self._window)  # window tokens whose text is in _pending or was sent
        self._undecoded: list[SampledToken] = []
        self._placed: list[_Placed] = []
        self._pending = ""
        self._num_sent = 0

    def push(self, pick: SampledToken, *, is_last: bool = False) -> TextChunk:
        """Adds one token and returns the text that can no longer change.

        If the token is the last one, returns all remaining text.
        """
        assert pick.token is not None, "a row without numbers has no text"
        self._window.append(pick.token)
        self._undecoded.append(pick)
        self._decode(is_last=is_last)
        if self._num_unstoppable:
            self._num_unstoppable -= 1
            return self._release(is_last=is_last, stop=())
        return self._release(is_last=is_last, stop=self._stop)

    def end(self) -> TextChunk:
        """Returns the text that was held back. An end token follows it, whose text is left out."""
        self._decode(is_last=True)
        return self._release(is_last=True, stop=self._stop)

    def _decode(self, *, is_last: bool) -> None:
        if not self._undecoded:
            return
        known = self._codec.decode(self._window[: self._num_read])
        text = self._codec.decode(self._window)
        if text.endswith(REPLACEMENT) and not is_last:
            return
        begin = self._num_sent + len(self._pending)
        self._pending += text[len(known) :]
        end = self._num_sent + len(self._pending)
        self._placed += [_Placed(pick, begin, end) for pick in self._undecoded]
        self._undecoded = []
        self._window = self._window[max(0, self._num_read - NUM_CONTEXT_TOKENS) :]
        self._num_read = len(self._window)

    def _release(self, *, is_last: bool, stop: Sequence[str]) -> TextChunk:
        found = [at for at in (self._pending.find(string) for string in stop) if at >= 0]
        if found:
            cut = self._num_sent + min(found)
            picks = tuple(placed.pick for placed in self._placed if placed.begin < cut)
            return TextChunk(self._pending[: min(found)], picks, is_stopped=True)
        num_held = 0 if is_last else self._num_held(stop)
        text = self._pending[: len(self._pending) - num_held]
        self._pending = self._pending[len(text) :]
        self._num_sent += len(text)
        picks = tuple(placed.pick for placed in self._placed if placed.end <= self._num_sent)
        self._placed = self._placed[len(picks) :]
        return TextChunk(text, picks)

    def _num_held(self, stop: Sequence[str]) -> int:
        longest = max((len(string) - 1 for string in stop), default=0)
        for length in range(min(longest, len(self._pending)), 0, -1):
            tail = self._pending[-length:]
            if any(string.startswith(tail) for string in stop):
                return length
        return 0
