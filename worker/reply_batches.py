"""Splits the replies of an engine step into batches that are quick to parse.

An API process parses each batch in its event loop, so a large one would delay other requests.
"""

from collections.abc import Iterable, Iterator

from app.contracts.generation import MAX_ENTRIES_PER_BATCH, Delta, Reply, ReplyBatch


def reply_batches(replies: Iterable[Reply]) -> Iterator[ReplyBatch]:
    """Yields all replies in order, in batches of at most `MAX_ENTRIES_PER_BATCH` entries.

    A batch exceeds the limit only if the entries of a single token do.
    """
    batch: list[Reply] = []
    num_entries = 0
    for reply in replies:
        for part in _parts(reply) if isinstance(reply, Delta) else (reply,):
            size = part.num_entries if isinstance(part, Delta) else 1
            if batch and num_entries + size > MAX_ENTRIES_PER_BATCH:
                yield ReplyBatch(replies=tuple(batch))
                batch, num_entries = [], 0
            batch.append(part)
            num_entries += size
    if batch:
        yield ReplyBatch(replies=tuple(batch))


def _parts(delta: Delta) -> Iterator[Delta]:
    """Yields the delta itself, or several deltas that share its tokens and log-probabilities.

    The last one also carries the text and all other fields.
    """
    logprobs, tokens = delta.logprobs or (), delta.tokens
    if delta.num_entries <= MAX_ENTRIES_PER_BATCH or len(logprobs) < 2:
        yield delta
        return
    step = max(1, MAX_ENTRIES_PER_BATCH * len(logprobs) // delta.num_entries - 1)
    last = (len(logprobs) - 1) // step * step
    for begin in range(0, last, step):
        part = slice(begin, begin + step)
        yield Delta(
            id=delta.id, choice=delta.choice, text="", tokens=tokens[part], logprobs=logprobs[part]
        )
    yield delta.model_copy(update={"tokens": tokens[last:], "logprobs": logprobs[last:]})
