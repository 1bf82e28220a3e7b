"""Tokens that begin together, in texts whose tokens are known by hand."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.tiny import tiny_tokenizer
from worker.distill.data.rows import Example, end_id_of
from worker.distill.losses.token_alignment import TokenBytes, align, aligned_tokens

EMOJI = "\U0001f600"  # four bytes


def byte_level(*merges: str) -> PreTrainedTokenizerBase:
    """All bytes, and the merges given as "left right"."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    pieces = ["<end>", *letters, *(left + right for left, right in pairs)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def characters(text: str) -> PreTrainedTokenizerBase:
    """One token a character of the text, as SentencePiece would write them, and bytes for all others."""
    pieces = [
        "</s>",
        "<unk>",
        *sorted(set(text.replace(" ", "▁"))),
        *(f"<0x{b:02X}>" for b in range(256)),
    ]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    end_id = end_id_of(tokenizer)
    assert end_id is not None
    return [*tokenizer.encode(text, add_special_tokens=False), end_id]


def pairs(
    one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, text: str
) -> list[tuple[int, int]]:
    return aligned_tokens(
        encode(one, text), TokenBytes(one), encode(other, text), TokenBytes(other)
    )


def named(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, text: str) -> list[str]:
    ids, other_ids = encode(one, text), encode(other, text)
    return [
        f"{one.convert_ids_to_tokens(ids[i])} {other.convert_ids_to_tokens(other_ids[j])}"
        for i, j in pairs(one, other, text)
    ]


def test_merged_tokens_leave_out_what_they_swallow() -> None:
    one, other = byte_level("a b", "c d"), byte_level("b c")
    assert named(one, other, "abcd") == ["ab a", "<end> <end>"]
    assert named(other, one, "abcd") == ["a ab", "<end> <end>"]
    assert named(byte_level("a b"), byte_level("c d"), "abcd") == ["ab a", "c cd", "<end> <end>"]


@pytest.mark.parametrize("kind", ["unigram", "wordpiece"])
def test_a_word_begins_with_its_space_however_that_is_written(kind: str) -> None:
    found = named(tiny_tokenizer("chat"), tiny_tokenizer(kind), "The still is warm")
    mark = {"unigram": "▁", "wordpiece": ""}[kind]
    assert [pair.split()[1] for pair in found[:-1]] == [
        mark + word for word in ("The", "still", "is", "warm")
    ]
    assert [pair.split()[0].lstrip("Ġ")[0] for pair in found[:-1]] == ["T", "s", "i", "w"]


def test_a_tokenizer_of_characters_meets_every_token_of_words() -> None:
    text = "The still is warm"
    words, letters = tiny_tokenizer("chat"), characters(text)
    found = pairs(words, letters, text)
    assert [i for i, _ in found] == list(range(len(encode(words, text))))
    beginnings = [letters.convert_ids_to_tokens(encode(letters, text)[j]) for _, j in found]
    assert beginnings[-1] == "</s>"
    assert "".join(beginnings[:-1]).count("▁") == 4


def test_bytes_within_a_character_meet_where_both_split_it_alike() -> None:
    first, second, third, _ = (
        byte_level().convert_ids_to_tokens(token) for token in encode(byte_level(), EMOJI)[:-1]
    )
    one, other = byte_level(f"{first} {second}"), byte_level(f"{second} {third}")
    assert pairs(one, other, EMOJI) == [(0, 0), (2, 2), (3, 3)]  # bytes 0 and 3, and the end
    assert pairs(byte_level(), characters("a b"), EMOJI) == [
        (0, 0),
        *((i, i + 1) for i in range(1, 5)),
    ]


def test_text_that_one_tokenizer_does_not_keep_is_passed_over() -> None:
    kept, lost = byte_level(), tiny_tokenizer("unigram")
    text = f"ab {EMOJI} cd {EMOJI}{EMOJI} ef"
    found = named(lost, kept, text)
    assert [pair.split()[1] for pair in found] == [
        "a",
        "b",
        "Ġ",
        "ð",
        "Ġ",
        "c",
        "d",
        "Ġ",
        "ð",
        "Ġ",
        "e",
        "f",
        "<end>",
    ]


def test_an_accent_or_capital_that_one_tokenizer_drops_costs_its_token_only() -> None:
    found = named(byte_level(), characters("the cafe opens"), "The")
    assert [pair.split()[0] for pair in found] == ["T", "h", "e", "<end>"]
    one, other = byte_level(), byte_level()
    of_one, of_other = TokenBytes(one), TokenBytes(other)
    ids, other_ids = encode(one, "The café opens"), encode(other, "the cafe opens")
    found_at = [i for i, _ in aligned_tokens(ids, of_one, other_ids, of_other)]
    assert set(range(len(ids))) - set(found_at) == {len("The caf") + 1}  # the second byte of é


def test_an_answer_without_an_end_has_no_end_to_align() -> None:
    one, other = byte_level(), byte_level("a b")
    of_one, of_other = TokenBytes(one), TokenBytes(other)
    assert aligned_tokens(encode(one, "ab")[:-1], of_one, encode(other, "ab"), of_other) == [(0, 0)]
    assert aligned_tokens(encode(one, "ab"), of_one, encode(other, "ab")[:-1], of_other) == [(0, 0)]
    assert aligned_tokens([], of_one, [], of_other) == []


def test_space_behind_the_text_is_not_taken_for_its_end() -> None:
    assert named(byte_level(), tiny_tokenizer("wordpiece"), "a ") == ["a a", "<end> [SEP]"]


@pytest.mark.parametrize("kind", ["chat", "unigram", "wordpiece"])
@pytest.mark.parametrize(
    "text", ["The still  is\n\n warm.", "naïve café ∑ 蒸馏", f"jar {EMOJI} jar"]
)
def test_one_tokenizer_under_other_numbers_aligns_everywhere(kind: str, text: str) -> None:
    tokenizer = tiny_tokenizer(kind)
    ids = encode(tokenizer, text)
    order = list(range(len(tokenizer)))
    random.Random(0).shuffle(order)
    of, of_other = TokenBytes(tokenizer), TokenBytes(tokenizer)
    of_other._of = {order[token]: data for token, data in of._of.items()}
    of_other.end_id = order[ids[-1]]
    assert aligned_tokens(ids, of, [order[token] for token in ids], of_other) == [
        (i, i) for i in range(len(ids))
    ]


def test_spans_are_matched_from_the_last_and_targets_counted_over_all() -> None:
    one, other = byte_level(), byte_level("a b")
    of_one, of_other = TokenBytes(one), TokenBytes(other)
    x, ab = encode(one, "x"), encode(one, "ab")
    student = Example((*x, *ab, *x, *ab), ((2, 5), (7, 10)))
    merged = encode(other, "ab")
    twice = Example((*x, *merged, *x, *merged), ((2, 4), (6, 8)))
    assert align(student, twice, of_one, of_other) == ([0, 2, 3, 5], [2, 3, 6, 7])
    assert align(student, Example((*x, *merged), ((2, 4),)), of_one, of_other) == ([3, 5], [2, 3])


def test_a_text_of_which_one_view_lacks_the_beginning_is_aligned_by_its_rest() -> None:
    one, other = byte_level(), byte_level("a b")
    of_one, of_other = TokenBytes(one), TokenBytes(other)
    whole, rest = encode(one, "abcd"), encode(other, "abcd")[1:]
    assert aligned_tokens(whole, of_one, rest, of_other) == [(2, 0), (3, 1), (4, 2)]
