"""Lower bounds on the number of tokens of a text.

With such a bound, a prompt that cannot fit the context is refused before it is tokenised.
"""

import json
from dataclasses import dataclass
from typing import Any

from worker.serve.text.detokenizer import BYTE_OF_LETTER

Json = dict[str, Any]  # Any: parts of tokenizer.json

NFC_SHRINKAGE = 4  # NFC leaves at least a quarter of the bytes of a text
# Behaviours of a pre-tokenizer's split that keep every character.
KEEPING_SPLITS = frozenset({"Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"})


@dataclass(frozen=True)
class SizeBound:
    """Size bound of one tokenizer: a token stands for at most `max_bytes` bytes of text.

    Bytes in `dropped` produce no tokens. `ending` is the text of the end token.
    """

    max_bytes: int
    dropped: bytes
    ending: str | None

    def least_tokens(self, text: str) -> int:
        """Returns a lower bound on the number of tokens of a text.

        End tokens at the end of the text are not counted, because prompts are cut before them.
        """
        stop = len(text)
        while self.ending and text.endswith(self.ending, 0, stop):
            stop -= len(self.ending)
        kept = text[:stop].encode(errors="surrogatepass").translate(None, self.dropped)
        return -(-len(kept) // self.max_bytes)


def size_bound(
    tokenizer: Any,  # transformers is untyped here
    end_id: int | None,
) -> SizeBound | None:
    """Returns the size bound of a tokenizer, or None if no bound is known.

    Bounds are known for byte-level BPE and for BPE with byte fallback. Both keep every byte for
    which they have a token. Other tokenizers may remove accents and spaces, or map a long word to
    one unknown token.

    The end token must appear in a text literally, because end tokens are cut off the end of a
    prompt.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    state: Json = json.loads(backend.to_str())
    shrinkage = _shrinkage(state["normalizer"])
    added = state["added_tokens"]
    ends = [token for token in added if token["id"] == end_id]
    is_end_literal = end_id is None or (
        len(ends) == 1 and not (ends[0]["normalized"] and state["normalizer"])
    )
    if (
        shrinkage is None
        or not _keeps_all(state["pre_tokenizer"])
        or state["model"]["type"] != "BPE"
    ):
        return None
    if not is_end_literal or any(token["lstrip"] or token["rstrip"] for token in added):
        return None  # such a token absorbs any number of spaces
    pieces: dict[str, int] = state["model"]["vocab"]
    dropped = b""
    if _is_byte_level(state["pre_tokenizer"]):
        dropped = bytes(byte for letter, byte in BYTE_OF_LETTER.items() if letter not in pieces)
        longest = max(map(len, pieces), default=0)  # each letter stands for one byte
    else:
        has_fallback = bool(state["model"].get("byte_fallback"))
        if not has_fallback or not all(f"<0x{byte:02X}>" in pieces for byte in range(256)):
            return None
        longest = max((len(piece.encode()) for piece in pieces), default=0)
    longest_added = max((len(token["content"].encode()) for token in added), default=0)
    if dropped and shrinkage > 1:
        return None  # bytes are dropped after normalisation, but counted before it
    ending = ends[0]["content"] if ends else None
    return SizeBound(max(1, shrinkage * max(longest, longest_added)), dropped, ending)


def _parts(step: Json | None, name: str) -> list[Json]:
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [part for inner in step[name] for part in _parts(inner, name)]
    return [step]


def _shrinkage(normalizer: Json | None) -> int | None:
    """Returns the factor by which a normalizer may shorten a text, or None if it is unknown."""
    factor = 1
    for step in _parts(normalizer, "normalizers"):
        match step:
            case {"type": "NFC"}:
                factor *= NFC_SHRINKAGE
            case {"type": "Prepend"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if len(
                new.encode()
            ) >= len(old.encode()):
                pass
            case _:
                return None
    return factor


def _keeps_all(pre_tokenizer: Json | None) -> bool:
    for step in _parts(pre_tokenizer, "pretokenizers"):
        match step:
            case {"type": "ByteLevel" | "Digits" | "Metaspace"}:
                pass
            case {"type": "Split" | "Punctuation", "behavior": str(behavior)} if (
                behavior in KEEPING_SPLITS
            ):
                pass
            case _:
                return False
    return True


def _is_byte_level(pre_tokenizer: Json | None) -> bool:
    return any(step["type"] == "ByteLevel" for step in _parts(pre_tokenizer, "pretokenizers"))
