"""The bytes of tokens, joined, are the bytes of the decoded text."""

import random

import pytest

from worker.serve.grammars.token_bytes import token_bytes
from worker.serve.loading import LoadedModel
from worker.serve.text.detokenizer import TokenText


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
def test_the_bytes_of_a_text_are_those_of_its_tokens(
    family: str, request: pytest.FixtureRequest
) -> None:
    loaded: LoadedModel = request.getfixturevalue(family)
    text, num_tokens = TokenText(loaded.tokenizer), len(loaded.tokenizer)
    tokens = token_bytes(text, num_tokens)
    first, rng = tokens.first or tokens.later, random.Random(2)
    visible = [token for token in range(num_tokens) if tokens.later[token]]
    for _ in range(200):
        drawn = [rng.choice(visible) for _ in range(8)]
        joined = first[drawn[0]] + b"".join(tokens.later[token] for token in drawn[1:])
        assert joined.decode(errors="replace") == text.decode(drawn)
