"""Where the tokens of two tokenizers begin together in one text.

A token stands for bytes. Its place is (bytes of the text before it, whitespace since), whitespace not being counted
among the text: so "Ġword", "▁word" and WordPiece's "word" begin alike, and so do tokens within one character.
"""

import json
import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from transformers import PreTrainedTokenizerBase

from worker.distill.data.rows import Example, end_id_of

UNKNOWN = b"\xff"  # in no text
WHITESPACE = frozenset(b" \t\n\r\v\f")
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's for what its vocabulary lacks
PLAIN_BYTES = (*range(33, 127), *range(161, 173), *range(174, 256))
# Byte-level vocabularies spell a byte as a letter: its own where it has one that prints.
LETTERS = {chr(byte): byte for byte in PLAIN_BYTES} | {
    chr(256 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(PLAIN_BYTES)))
}

Place = tuple[int, int]


class TokenBytes:
    """What the tokens of a vocabulary stand for; special tokens stand for nothing, the unknown for a byte of its own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.end_id = end_id_of(tokenizer)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str())["decoder"] if backend is not None else None
        self._is_byte_level = '"ByteLevel"' in json.dumps(decoder)
        self._continuing = decoder["prefix"] if decoder and decoder["type"] == "WordPiece" else ""
        self._of = {token: self._read(piece) for piece, token in tokenizer.get_vocab().items()}
        added = tokenizer.added_tokens_decoder
        self._of |= {token: b"" if t.special else t.content.encode() for token, t in added.items()}
        self._of |= dict.fromkeys(tokenizer.all_special_ids, b"")
        if tokenizer.unk_token_id is not None:
            self._of[tokenizer.unk_token_id] = UNKNOWN

    def _read(self, piece: str) -> bytes:
        if self._is_byte_level and all(letter in LETTERS for letter in piece):
            return bytes(LETTERS[letter] for letter in piece)
        if found := BYTE_PIECE.fullmatch(piece):
            return bytes.fromhex(found[1])
        return piece.removeprefix(self._continuing).removesuffix("</w>").replace("▁", " ").encode()

    def places(self, token_ids: Sequence[int]) -> tuple[bytes, list[Place]]:
        """The text without whitespace (in lower case, since some vocabularies know no other) and the tokens' places."""
        text = bytearray()
        num_spaces = 0
        places = []
        for token in token_ids:
            places.append((len(text), num_spaces))
            for byte in self._of.get(token, b""):
                if byte in WHITESPACE:
                    num_spaces += 1
                else:
                    text.append(byte)
                    num_spaces = 0
        return bytes(text).lower(), places


def aligned_tokens(
    ids: Sequence[int], of: TokenBytes, other_ids: Sequence[int], of_other: TokenBytes
) -> list[tuple[int, int]]:
    """Numbers of the tokens that begin together in two readings of a text, rising; end tokens go together.

    Where one tokenizer does not keep the text (an unknown letter, an accent), tokens are found again behind the gap.
    """
    have_ends = (
        len(ids) > 0 and ids[-1] == of.end_id,
        len(other_ids) > 0 and other_ids[-1] == of_other.end_id,
    )
    text, places = of.places(ids[: len(ids) - have_ends[0]])
    other_text, other_places = of_other.places(other_ids[: len(other_ids) - have_ends[1]])
    first_at: dict[Place, int] = {}
    for number, place in enumerate(other_places):
        first_at.setdefault(
            place, number
        )  # of tokens that stand for nothing only the first can be told
    shared = _shared_stretches(text, other_text)
    pairs: list[tuple[int, int]] = []
    done: set[Place] = set()
    for number, (at, num_spaces) in enumerate(places):
        if (at, num_spaces) in done:
            continue
        done.add((at, num_spaces))
        for start, other_start, length in shared:
            if start <= at <= start + length:
                partner = first_at.get((at - start + other_start, num_spaces))
                if partner is not None and (not pairs or partner > pairs[-1][1]):
                    pairs.append((number, partner))
                break
    if all(have_ends):
        pairs.append((len(ids) - 1, len(other_ids) - 1))
    return pairs


def _shared_stretches(text: bytes, other: bytes) -> list[tuple[int, int, int]]:
    """(start, other start, length) of what two texts have in common, in order."""
    if text == other:
        return [(0, 0, len(text))]
    blocks = SequenceMatcher(None, text, other, autojunk=False).get_matching_blocks()
    return [(block.a, block.b, block.size) for block in blocks]


def align(
    student: Example, teacher: Example, of_student: TokenBytes, of_teacher: TokenBytes
) -> tuple[list[int], list[int]]:
    """Of two readings of a row: numbers of the student's targets, and the positions of the teacher's that begin there.

    Spans are matched from the last, because a template may hide earlier answers from one of the two.
    """
    first_numbers = [0]
    for start, end in student.spans:
        first_numbers.append(first_numbers[-1] + end - start)
    numbers: list[int] = []
    positions: list[int] = []
    num_spans = min(len(student.spans), len(teacher.spans))
    for k in range(-num_spans, 0):
        (start, end), (other_start, other_end) = student.spans[k], teacher.spans[k]
        ids, other_ids = student.token_ids[start:end], teacher.token_ids[other_start:other_end]
        for number, partner in aligned_tokens(ids, of_student, other_ids, of_teacher):
            numbers.append(first_numbers[k - 1] + number)
            positions.append(other_start + partner)
    return numbers, positions
