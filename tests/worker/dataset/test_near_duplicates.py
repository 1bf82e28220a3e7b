"""The index of similar texts agrees with a comparison of all pairs."""

import random

from worker.dataset.near_duplicates import SimilarTexts, jaccard, normalised, shingles

WORDS = [f"word{number}" for number in range(300)]


def texts(count: int) -> list[str]:
    """Texts of which many are copies of an earlier one with some words changed."""
    chance = random.Random(7)
    corpus: list[str] = []
    for _ in range(count):
        if corpus and chance.random() < 0.6:
            words = chance.choice(corpus).split()
            for _ in range(chance.randrange(1, 5)):
                words[chance.randrange(len(words))] = chance.choice(WORDS)
        else:
            words = [chance.choice(WORDS) for _ in range(20)]
        corpus.append(" ".join(words))
    return corpus


def test_similar_texts_are_those_of_a_comparison_of_all_pairs() -> None:
    corpus = texts(300)
    sets = [shingles(text) for text in corpus]
    index = SimilarTexts(0.8, corpus.__getitem__)
    num_pairs = 0
    for number, text in enumerate(corpus):
        expected = {other for other in range(number) if jaccard(sets[number], sets[other]) >= 0.8}
        num_pairs += len(expected)
        assert set(index.add(number, text)) == expected
    assert num_pairs > 100


def test_a_text_that_is_similar_is_not_added() -> None:
    corpus = [
        "how do i reset my password today",
        "how do i reset my password today?",
        "other words",
    ]
    index = SimilarTexts(0.8, corpus.__getitem__)
    assert [index.add_unless_similar(n, text) for n, text in enumerate(corpus)] == [
        True,
        False,
        True,
    ]


def test_texts_are_compared_without_case_width_and_white_space() -> None:
    assert normalised("Ｈow\n do  I") == "how do i"
    assert shingles("ab") == {"ab"}
    assert shingles("") == {""}
    assert jaccard(shingles("abcdef"), shingles("abcdeg")) == 1 / 3


def test_of_many_texts_that_differ_in_a_number_few_are_added() -> None:
    text = "what is the status of my order with the number"
    corpus = [f"{text} {number}" for number in range(2000)]
    index = SimilarTexts(0.8, corpus.__getitem__)
    num_added = sum(index.add_unless_similar(n, text) for n, text in enumerate(corpus))
    assert 1 <= num_added < 20
