"""The bound on a token's bytes holds for every text, or is not given."""

import random
import sys
import unicodedata
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny import SENTENCES, tiny_tokenizer
from worker.serve.text.prompt_size import NFC_SHRINKAGE, SizeBound, size_bound
from worker.serve.text.prompts import end_id_of

LETTERS = "ab\x06 le\n\t  é蒸🙂\u0301\u212a"


def with_byte_fallback() -> Any:  # Any: transformers is untyped here
    """A tokenizer as Llama 2 has it: spaces become ▁, and what is not in the vocabulary bytes."""
    pieces = [
        "<unk>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "t",
        "h",
        "th",
        "▁th",
        "▁▁",
    ]
    merges = [("t", "h"), ("▁", "th"), ("▁", "▁")]
    vocabulary = {piece: token_id for token_id, piece in enumerate(pieces)}
    backend = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def with_nfc() -> Any:  # Any: transformers is untyped here
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def without_some_bytes() -> Any:  # Any: transformers is untyped here
    """As SmolLM2's, whose vocabulary lacks control characters; they are dropped."""
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"\u0106", "b"})
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def bound_of(tokenizer: Any) -> SizeBound | None:  # Any: transformers is untyped here
    return size_bound(tokenizer, end_id_of(tokenizer))


@pytest.mark.parametrize(
    "tokenizer", [tiny_tokenizer(), with_byte_fallback(), with_nfc(), without_some_bytes()]
)
def test_no_text_has_fewer_tokens_than_the_bound_says(tokenizer: Any) -> None:
    bound, rng = bound_of(tokenizer), random.Random(0)
    assert bound is not None
    longest = max(tokenizer.get_vocab(), key=lambda piece: len(piece.encode()))
    texts = [tokenizer.convert_tokens_to_string([longest]) * 20, *SENTENCES]
    texts += ["".join(rng.choices(LETTERS, k=200)) for _ in range(200)]
    texts += [rng.choice(LETTERS) * 500 for _ in range(20)]
    for text in texts:
        num_tokens = len(tokenizer(text, add_special_tokens=False).input_ids)
        assert 0 <= bound.least_tokens(text) <= num_tokens


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_there_is_no_bound_where_text_may_be_dropped(kind: str) -> None:
    assert bound_of(tiny_tokenizer(kind)) is None


def test_there_is_no_bound_where_a_token_takes_the_spaces_around_it() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<greedy>", rstrip=True)])
    assert bound_of(tokenizer) is None


def test_there_is_no_bound_where_bytes_are_missing_or_removed() -> None:
    missing = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, [])))
    assert bound_of(missing) is None
    removing = tiny_tokenizer()
    assert bound_of(removing) is not None
    removing.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()]
    )
    assert bound_of(removing) is None


def test_composition_never_shrinks_a_text_by_more_than_the_factor() -> None:
    longest: dict[
        str, int
    ] = {}  # bytes of the longest character that is composed of this one alone
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    for character in characters:
        single = unicodedata.normalize("NFC", character)
        longest[single] = max(longest.get(single, 0), len(character.encode()))
    for character in characters:
        if unicodedata.normalize("NFC", character) == character:
            parts = unicodedata.normalize("NFD", character)
            num_bytes = sum(max(longest.get(part, 0), len(part.encode())) for part in parts)
            assert max(num_bytes, longest[character]) <= NFC_SHRINKAGE * len(character.encode())


def test_endings_behind_a_text_do_not_count() -> None:
    bound = SizeBound(1, b"", "</s>")
    assert bound.least_tokens("é</s></s>") == 2
    assert bound.least_tokens("\ud800") == 3
