"""Lower bounds on the number of tokens of a text, so that a prompt that cannot fit is refused before it is tokenised."""

import json
from dataclasses import dataclass
from typing import Any

from worker.serve.text.detokenizer import BYTE_OF_LETTER

Json = dict[str, Any]  # Any: parts of tokenizer.json

NFC_SHRINKAGE = 4  # composed text has at least a quarter of the bytes
KEEPING_SPLITS = frozenset({"Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"})


@dataclass(frozen=True)
class SizeBound:
    """No token stands for more than `max_bytes` bytes of text; bytes in `dropped` have no tokens."""

    max_bytes: int
    dropped: bytes
    ending: str | None

    def least_tokens(self, text: str) -> int:
        """Returns a lower bound on the tokens of a text, less the endings behind it, which are not counted as tokens."""
        stop = len(text)
        while self.ending and text.endswith(self.ending, 0, stop):
            stop -= len(self.ending)
        kept = text[:stop].encode(errors="surrogatepass").translate(None, self.dropped)
        return -(-len(kept) // self.max_bytes)


def size_bound(
    tokenizer: Any,  # transformers is untyped here
    end_id: int | None,
) -> SizeBound | None:
    """Returns the bound for texts of a tokenizer, or None if there is none that we know.

    There is one for byte-level BPE, and for BPE that falls back to bytes: they keep every byte that they have a token
    for. Other tokenizers may remove accents and spaces, or make one unknown token of a long word. The end token must be
    one that a text contains literally, since prompts are cut where they end with it.
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
        return None  # they take any number of spaces
    pieces: dict[str, int] = state["model"]["vocab"]
    dropped = b""
    if _is_byte_level(state["pre_tokenizer"]):
        dropped = bytes(byte for letter, byte in BYTE_OF_LETTER.items() if letter not in pieces)
        longest = max(map(len, pieces), default=0)  # a letter is a byte
    else:
        has_fallback = bool(state["model"].get("byte_fallback"))
        if not has_fallback or not all(f"<0x{byte:02X}>" in pieces for byte in range(256)):
            return None
        longest = max((len(piece.encode()) for piece in pieces), default=0)
    longest_added = max((len(token["content"].encode()) for token in added), default=0)
    if dropped and shrinkage > 1:
        return None  # bytes are dropped after normalisation, and counted before
    ending = ends[0]["content"] if ends else None
    return SizeBound(max(1, shrinkage * max(longest, longest_added)), dropped, ending)


def _parts(step: Json | None, name: str) -> list[Json]:
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [part for inner in step[name] for part in _parts(inner, name)]
    return [step]


def _shrinkage(normalizer: Json | None) -> int | None:
    """Returns by what factor normalised text may be shorter; None if there is no bound that we know."""
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
