"""State of the grammar of one row, and the vocabulary that all rows of an engine share."""

from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

Words = NDArray[np.int32]  # masks have one bit per token
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


@dataclass(frozen=True)
class NextMask:
    """Mask of the next token. It is complete when `done`, if there is one, has a result."""

    words_W: Words
    done: Future[None] | None

    def wait(self) -> None:
        """Waits until the other thread has used the matcher. Raises its errors."""
        if self.done is not None:
            self.done.result()


@dataclass
class Constraint:
    """State of the grammar of one row.

    A matcher of llguidance never raises an error. After an error its mask allows end tokens only,
    as after a complete answer. `fault` must therefore be read after each mask.

    is_first: The next token is the first one of a text, and has other bytes there.
    fault: Message of an error of the matcher. The answer must then fail.
    next_mask: Mask of the next token, if its computation has begun. The matcher must not be used
        before it is complete.
    """

    matcher: LLMatcher
    vocabulary: Vocabulary
    is_first: bool
    fault: str | None = None
    next_mask: NextMask | None = None

    def __deepcopy__(self, _: object) -> "Constraint":
        if self.next_mask is not None:
            self.next_mask.wait()
        return replace(self, matcher=self.matcher.deep_copy())

    def take_mask(self) -> Words:
        """Returns the mask of the next token, whose computation has begun."""
        assert self.next_mask is not None
        self.next_mask.wait()
        words_W, self.next_mask = self.next_mask.words_W, None
        return words_W

    @property
    def is_over(self) -> bool:
        """True if only an end token may follow. Read it after the mask was computed."""
        return self.matcher.is_stopped()

    def record(self, token: int) -> None:
        """Records the next token of the row."""
        if self.next_mask is not None:
            self.take_mask()  # it was not needed
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
