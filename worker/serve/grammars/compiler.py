"""Compiles grammars into matchers for one tokenizer."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import structlog
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from app.contracts.generation import Grammar
from worker.serve.errors import InvalidGrammar, raise_unless_panic
from worker.serve.grammars.check_process import GRAMMAR_CHECKER
from worker.serve.grammars.constraint import WORD_BITS, Constraint, Vocabulary
from worker.serve.grammars.sources import LIMITS, source_of
from worker.serve.grammars.token_bytes import token_bytes
from worker.serve.text.detokenizer import TokenText

log = structlog.get_logger(__name__)

MAX_CACHED: Final = 128  # grammars per engine


class GrammarCompiler:
    """Compiles the grammars of one engine. All methods may be called from any thread."""

    def __init__(self, text: TokenText, *, num_logits: int, end_ids: frozenset[int]) -> None:
        self._text = text
        self._num_logits = num_logits
        # A config may name end tokens that the model does not have.
        self._end_ids = frozenset(token for token in end_ids if 0 <= token < num_logits)
        self._vocabulary: Vocabulary | None = None
        self._is_unsuitable = False  # the vocabulary cannot be built
        self._vocabulary_lock = threading.Lock()
        self._compiled: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()
        self._compiled_lock = threading.Lock()

    def prepare(self) -> Vocabulary:
        """Returns the vocabulary. The first call builds it, and holds the GIL for a while.

        Raises InvalidGrammar if the model cannot follow grammars.
        """
        if not self._end_ids:
            raise InvalidGrammar(
                "this model has no end token, so its answers cannot follow a grammar; use another model, or leave out structured outputs and strict or required tools"
            )
        with self._vocabulary_lock:
            if self._vocabulary is None and not self._is_unsuitable:
                self._vocabulary = self._build_vocabulary()
                self._is_unsuitable = self._vocabulary is None
            if self._vocabulary is None:
                raise InvalidGrammar(
                    "the tokenizer of this model does not support grammars; use another model, or leave out structured outputs and strict or required tools"
                )
            return self._vocabulary

    def _build_vocabulary(self) -> Vocabulary | None:
        try:
            return vocabulary_of(self._text, self._num_logits, self._end_ids)
        except BaseException as error:  # noqa: BLE001  # a tokenizer may raise any exception
            if not isinstance(error, Exception):
                raise_unless_panic(error)
            log.warning("grammars_unavailable", error=str(error)[:300])
            return None

    def compile(self, grammar: Grammar, *, is_checked: bool = False) -> LLMatcher:
        """Returns the matcher of a grammar in its initial state, from a bounded cache.

        A compilation may take long, but releases the GIL. With `is_checked`, the grammar was
        compiled before, and is not checked again in a child process. That check may wait for the
        grammars of other clients. Raises InvalidGrammar.
        """
        key = (grammar.kind, grammar.text)
        with self._compiled_lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return self._compiled[key]
        try:
            vocabulary = self.prepare()
        except InvalidGrammar as error:
            raise error.about(grammar) from None
        if not is_checked:
            GRAMMAR_CHECKER.demand_compilable(grammar)
        matcher = LLMatcher(vocabulary.tokenizer, source_of(grammar), log_level=0, limits=LIMITS)
        if matcher.is_error():
            message = f"the grammar cannot be enforced: {matcher.get_error()[:300]}"
            raise InvalidGrammar(message).about(grammar)
        with self._compiled_lock:
            self._compiled[key] = matcher
            if len(self._compiled) > MAX_CACHED:
                self._compiled.popitem(last=False)
        return matcher

    def constraint(self, grammar: Grammar, window: Sequence[int]) -> Constraint:
        """Returns a new constraint for an answer that is decoded after the tokens `window`.

        The grammar must have been compiled before. If the cache has lost it, it is compiled again,
        without the check in a child process. Raises InvalidGrammar.
        """
        matcher, vocabulary = self.compile(grammar, is_checked=True), self.prepare()
        is_first = vocabulary.has_first and not self._text.decode(window)
        return Constraint(matcher.deep_copy(), vocabulary, is_first)


def vocabulary_of(text: TokenText, num_logits: int, end_ids: frozenset[int]) -> Vocabulary:
    """Returns the vocabulary of a tokenizer for a model with `num_logits` logits."""
    found = token_bytes(text, num_logits)
    padding = [b""] * (-num_logits % WORD_BITS)
    tokens = [*found.later, *padding]
    if found.first is not None:
        tokens += [*found.first, *padding]
    tokenizer = LLTokenizer(
        TokenizerWrapper(_Tokens(tokens, end_ids, text)), eos_token=sorted(end_ids)
    )
    return Vocabulary(tokenizer, num_logits, end_ids, found.first is not None)


class _Tokens:
    """Tokens as `TokenizerWrapper` reads them."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], end_ids: frozenset[int], text: TokenText) -> None:
        self._text = text
        for end_id in end_ids:
            tokens[end_id] = b""
        self.tokens = tokens
        self.eos_token_id = min(end_ids)
        self.special_token_ids = [token for token, data in enumerate(tokens) if not data]

    def __call__(self, text: bytes | str) -> list[int]:
        # The mask after forced bytes allows the first token of this result only.
        return self._text.encode(text.decode(errors="ignore") if isinstance(text, bytes) else text)
