"""State of the grammar of one row, and the vocabulary that all rows of an engine share."""

from dataclasses import dataclass
from typing import Final

from llguidance import LLMatcher, LLTokenizer

WORD_BITS: Final = 32  # masks consist of words of this size


@dataclass(frozen=True)
class Vocabulary:
    """Vocabulary of one engine in the form that llguidance needs.

    has_first: The vocabulary has each token twice, because tokens have other bytes at the beginning
        of a text. The second copy begins at `first_offset`.
    """

    tokenizer: LLTokenizer
    num_logits: int
    end_ids: frozenset[int]
    has_first: bool

    @property
    def num_words(self) -> int:
        """Number of words of a mask for one copy of the tokens."""
        return -(-self.num_logits // WORD_BITS)

    @property
    def first_offset(self) -> int:
        return self.num_words * WORD_BITS

    @property
    def num_mask_words(self) -> int:
        return self.num_words * (2 if self.has_first else 1)


@dataclass
class Constraint:
    """State of the grammar of one row.

    A matcher of llguidance never raises an error. After an error its mask allows end tokens only,
    as after a complete answer. `fault` must therefore be read after each mask.

    is_first: The next token is the first one of a text, and has other bytes there.
    fault: Message of an error of the matcher. The answer must then fail.
    """

    matcher: LLMatcher
    vocabulary: Vocabulary
    is_first: bool
    fault: str | None = None

    def __deepcopy__(self, _: object) -> "Constraint":
        return Constraint(self.matcher.deep_copy(), self.vocabulary, self.is_first, self.fault)

    @property
    def is_over(self) -> bool:
        """True if only an end token may follow. Read it after the mask was computed."""
        return self.matcher.is_stopped()

    def record(self, token: int) -> None:
        """Records the next token of the row."""
        if token in self.vocabulary.end_ids:
            return
        offset = self.vocabulary.first_offset if self.is_first else 0
        self.is_first = False
        self.matcher.consume_token(offset + token)

    def poll(self) -> None:
        """Sets `fault` if the matcher is in an error state."""
        if self.fault is None and self.matcher.is_error():
            lines = self.matcher.get_error().strip().split("\n")
            self.fault = lines[0][:200] or "unknown error"
