"""Aligns the tokens of two tokenizers that begin at the same place of a text.

Each token represents bytes. The place of a token is a pair: the number of text bytes before it, and
the number of whitespace bytes since the last text byte. Text bytes exclude whitespace. Therefore
"Ġword", "▁word" and WordPiece's "word" have the same place. Tokens that begin within a character
can be aligned too.
"""

import json
import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from transformers import PreTrainedTokenizerBase

from worker.distill.data.rows import Example, end_id_of

UNKNOWN = b"\xff"  # occurs in no UTF-8 text
WHITESPACE = frozenset(b" \t\n\r\v\f")
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")  # a byte without a token in SentencePiece
PLAIN_BYTES = (*range(33, 127), *range(161, 173), *range(174, 256))
# Byte-level vocabularies write each byte as a character: its own if that is printable.
LETTERS = {chr(byte): byte for byte in PLAIN_BYTES} | {
    chr(256 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(PLAIN_BYTES)))
}

Place = tuple[int, int]


class TokenBytes:
    """Maps the tokens of a vocabulary to the bytes that they represent.

    Special tokens represent no bytes. The unknown token represents UNKNOWN.
    """

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
        """Returns the text of the tokens without whitespace, and the place of each token.

        The text is in lower case, because some vocabularies are.
        """
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
    """Returns index pairs of the tokens that begin at the same place of a text, in rising order.

    An end token in both sequences is a pair too. A tokenizer may change the text, for example an
    unknown letter or an accent. Alignment then continues after the difference.
    """
    have_ends = (
        len(ids) > 0 and ids[-1] == of.end_id,
        len(other_ids) > 0 and other_ids[-1] == of_other.end_id,
    )
    text, places = of.places(ids[: len(ids) - have_ends[0]])
    other_text, other_places = of_other.places(other_ids[: len(other_ids) - have_ends[1]])
    first_at: dict[Place, int] = {}
    for number, place in enumerate(other_places):
        # tokens without bytes share a place with the next token: only the first is used
        first_at.setdefault(place, number)
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
    """Returns (start, other start, length) of the parts that two texts have in common, in order."""
    if text == other:
        return [(0, 0, len(text))]
    blocks = SequenceMatcher(None, text, other, autojunk=False).get_matching_blocks()
    return [(block.a, block.b, block.size) for block in blocks]


def align(
    student: Example, teacher: Example, of_student: TokenBytes, of_teacher: TokenBytes
) -> tuple[list[int], list[int]]:
    """Aligns the targets of a row that the student and the teacher encode differently.

    Returns the indices of the student's aligned targets, and the positions of their partners in
    the teacher's tokens. Spans are matched from the last one backwards, because a chat template may
    leave out earlier answers for one of the two models.
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
