"""No batch of replies is so large that parsing it blocks the API process."""

from app.contracts.generation import MAX_ENTRIES_PER_BATCH, Delta, Done, Reply, TokenLogprob
from worker.reply_batches import reply_batches


def delta(num_tokens: int, text: str = "text") -> Delta:
    top = tuple((f"t{i}", -1.0) for i in range(20))
    logprobs = tuple(
        TokenLogprob(token=str(i), logprob=-0.5, bytes=(1,), top=top) for i in range(num_tokens)
    )
    tokens = tuple(range(num_tokens))
    return Delta(
        id="r", choice=0, text=text, tokens=tokens, logprobs=logprobs, finish_reason="stop"
    )


def test_a_step_of_ordinary_size_goes_out_in_one_batch() -> None:
    replies: list[Reply] = [*[delta(1)] * 64, Done(id="r", prompt_tokens=1, completion_tokens=1)]
    (batch,) = reply_batches(replies)
    assert batch.replies == tuple(replies)


def test_a_large_answer_comes_in_batches_of_bounded_size_and_nothing_is_lost() -> None:
    whole, done = delta(1000), Done(id="r", prompt_tokens=1, completion_tokens=1000)
    batches = list(reply_batches([whole, done]))
    assert batches[-1].replies[-1] == done
    deltas = [reply for batch in batches for reply in batch.replies if isinstance(reply, Delta)]
    assert tuple(entry for part in deltas for entry in part.logprobs or ()) == whole.logprobs
    assert "".join(part.text for part in deltas) == "text"
    assert [part.finish_reason for part in deltas] == [None] * (len(deltas) - 1) + ["stop"]
    assert tuple(token for part in deltas for token in part.tokens) == whole.tokens
    for batch in batches:
        assert sum(reply.num_entries for reply in batch.replies if isinstance(reply, Delta)) <= (
            MAX_ENTRIES_PER_BATCH
        )
