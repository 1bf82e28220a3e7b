"""Text as it becomes certain: whole characters, no half stop strings, tokens placed with their text."""

import random

import pytest

from tests.tiny import tiny_tokenizer
from worker.serve.decoding.sampling import SampledToken
from worker.serve.text.detokenizer import REPLACEMENT, TextChunk, TextStream, TokenText

TOKENIZER = tiny_tokenizer()
TEXT = TokenText(TOKENIZER)


def stream_of(*stop: str, prompt: tuple[int, ...] = ()) -> TextStream:
    return TextStream(TEXT, prompt=prompt, stop=stop)


def push_all(stream: TextStream, tokens: list[int]) -> list[TextChunk]:
    """Feeds tokens until the stream stops; the last one is told so."""
    pieces = []
    for index, token in enumerate(tokens):
        pieces.append(stream.push(SampledToken(token), is_last=index == len(tokens) - 1))
        if pieces[-1].is_stopped:
            break
    return pieces


def letters(text: str) -> list[int]:
    """One token a byte, the finest that this tokenizer can write a text in."""
    by_bytes = {TEXT.bytes_of(token): token for token in range(len(TOKENIZER))}
    return [by_bytes[bytes([byte])] for byte in text.encode()]


def joined(pieces: list[TextChunk]) -> str:
    return "".join(piece.text for piece in pieces)


def test_pieces_join_to_the_text() -> None:
    tokens = TOKENIZER("The still is warm, naïve café ∑ 蒸馏 😀.").input_ids
    assert joined(push_all(stream_of(), tokens)) == "The still is warm, naïve café ∑ 蒸馏 😀."


@pytest.mark.parametrize("seed", range(20))
def test_random_tokens_join_to_what_decoding_them_together_gives(seed: int) -> None:
    rng = random.Random(seed)
    # mostly bytes that are no characters
    tokens = [rng.randrange(len(TOKENIZER)) for _ in range(60)]
    expected = TOKENIZER.decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert joined(push_all(stream_of(), tokens)) == expected


def test_a_character_is_never_split() -> None:
    pieces = push_all(stream_of(), letters("é蒸😀a"))
    assert [piece.text for piece in pieces] == ["", "é", "", "", "蒸", "", "", "", "😀", "a"]


def test_tokens_come_with_the_character_they_make() -> None:
    pieces = push_all(stream_of(), letters("é!"))
    assert [len(piece.picks) for piece in pieces] == [0, 2, 1]


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    assert joined(push_all(stream_of(), letters("a蒸")[:-1])) == "a" + REPLACEMENT


def test_the_end_gives_what_was_held() -> None:
    stream = stream_of("abcd")
    assert [stream.push(SampledToken(token)).text for token in letters("xabc")] == ["x", "", "", ""]
    assert stream.end() == TextChunk("abc", tuple(SampledToken(token) for token in letters("abc")))


def test_a_stop_string_over_token_borders_is_cut_off() -> None:
    pieces = push_all(stream_of("END"), letters("one ENtwo END three"))
    assert joined(pieces) == "one ENtwo "
    assert pieces[-1].is_stopped


def test_stop_strings_are_looked_for_behind_the_first_tokens() -> None:
    tokens = letters("END EN END more")
    stream = TextStream(TEXT, prompt=(), stop=("END",), min_tokens=5)
    pieces = [stream.push(SampledToken(token)) for token in tokens[:10]]
    assert [piece.text for piece in pieces[:5]] == ["E", "N", "D", " ", "E"]  # nothing is held back
    assert joined(pieces) == "END EN "
    assert pieces[-1].is_stopped


def test_no_part_of_a_stop_string_is_sent_before_it_is_decided() -> None:
    pieces = push_all(stream_of("END"), letters("aENb"))
    assert [piece.text for piece in pieces] == ["a", "", "", "ENb"]


def test_the_tokens_of_a_stop_string_are_not_given() -> None:
    pieces = push_all(stream_of("END"), letters("abEND"))
    assert [pick.token for piece in pieces for pick in piece.picks] == letters("ab")


def test_a_token_that_only_ends_in_a_stop_string_is_given() -> None:
    [token] = [t for t in range(len(TOKENIZER)) if TEXT.bytes_of(t) == b" is"]
    [piece] = push_all(stream_of("s"), [token])
    assert piece == TextChunk(" i", (SampledToken(token),), is_stopped=True)


def test_the_stop_string_that_is_complete_first_wins() -> None:
    assert joined(push_all(stream_of("abcd", "bc"), letters("xabcd"))) == "xa"


def test_of_two_stop_strings_in_one_token_the_earlier_cuts() -> None:
    [token] = [t for t in range(len(TOKENIZER)) if TEXT.bytes_of(t) == b" is"]
    assert joined(push_all(stream_of("s", "is"), [token])) == " "


def test_a_stop_string_may_overlap_its_own_false_start() -> None:
    pieces = push_all(stream_of("aab"), letters("aaab!"))
    assert joined(pieces) == "a"
    assert pieces[-1].is_stopped


def test_a_stop_string_in_the_last_token_counts() -> None:
    assert push_all(stream_of("b"), letters("ab"))[-1].is_stopped


def test_a_stop_string_of_several_bytes_a_character_is_found() -> None:
    assert joined(push_all(stream_of("蒸馏"), letters("a蒸b蒸馏c"))) == "a蒸b"


def test_special_tokens_have_no_text_and_an_empty_stop_string_stops_nothing() -> None:
    tokens = [*letters("a"), TOKENIZER.pad_token_id, *letters("b")]
    pieces = push_all(stream_of(""), tokens)
    assert joined(pieces) == "ab"
    assert [pick.token for piece in pieces for pick in piece.picks] == tokens


def test_a_prompt_that_ends_inside_a_character_leaves_the_answer_alone() -> None:
    assert joined(push_all(stream_of(prompt=tuple(letters("蒸")[:2])), letters("ab"))) == "ab"


def test_a_first_word_keeps_its_leading_space() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"▁The": 0, "▁still": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer.decode([1]) == "still"
    assert joined(push_all(TextStream(TokenText(tokenizer), prompt=(0,)), [1])) == " still"


def test_bytes_of_all_tokens_make_the_text() -> None:
    text = "naïve café ∑ 蒸馏 1 2\n"
    assert b"".join(TEXT.bytes_of(token) for token in TOKENIZER(text).input_ids) == text.encode()


def test_special_and_unknown_tokens_have_bytes_too() -> None:
    assert TEXT.bytes_of(TOKENIZER.eos_token_id) == b"<|im_end|>"
    assert TEXT.bytes_of(len(TOKENIZER) + 5) == b""


def test_logprobs_show_partial_characters_as_bytes() -> None:
    first, *_ = letters("é")
    shown = TEXT.logprob_of(SampledToken(first, -0.5, ((first, -0.5),)))
    assert shown is not None
    assert (shown.token, shown.bytes, shown.top) == (REPLACEMENT, (0xC3,), ((REPLACEMENT, -0.5),))
