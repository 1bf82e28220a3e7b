"""The range of a tokenizer's token ids, which may have gaps."""

from typing import Any


def num_token_ids(tokenizer: Any) -> int:  # Any: transformers is untyped here
    """Returns one more than the highest token id: the embedding rows that the tokenizer needs.

    `len(tokenizer)` counts the tokens, which are fewer where ids are left out, as in a vocab.txt with a repeated line.
    """
    return 1 + max(tokenizer.get_vocab().values(), default=-1)
