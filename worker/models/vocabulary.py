"""Range of a tokenizer's token ids, which may have gaps."""

from typing import Any


def num_token_ids(tokenizer: Any) -> int:  # Any: transformers is untyped here
    """Returns one more than the highest token id: the embedding rows that the tokenizer needs.

    `len(tokenizer)` is the number of tokens. It is smaller if ids are unused, for example because
    a line of vocab.txt is repeated.
    """
    return 1 + max(tokenizer.get_vocab().values(), default=-1)
