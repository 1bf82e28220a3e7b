"""Continuous batching of token sequences: rows come free at once, arrivals starve nobody."""

import torch

from worker.serve.decoding.decoder import Decoder, Sequence
from worker.serve.decoding.sampling import TokenSampler, seeded_generator
from worker.serve.loading import LoadedModel


def sequence(
    name: str, *, prompt: tuple[int, ...] = (5, 6, 7), max_tokens: int = 4, choice: int = 0
) -> Sequence:
    return Sequence(name, prompt, max_tokens, frozenset(), TokenSampler(), choice)


def decoder_of(loaded: LoadedModel, *sequences: Sequence, max_running: int = 4) -> Decoder:
    decoder = Decoder(loaded.model, max_running=max_running, max_context_tokens=256)
    for each in sequences:
        decoder.add(each)
    return decoder


def test_a_step_gives_each_running_sequence_one_token(llama: LoadedModel) -> None:
    decoder = decoder_of(llama, sequence("a"), sequence("b", prompt=(9,)))
    for num_tokens in range(1, 4):
        assert [s.request_id for s, _ in decoder.step()] == ["a", "b"]
        assert decoder.num_running == 2
        assert [len(s.tokens) for s in decoder._rows] == [num_tokens] * 2


def test_a_finished_sequence_frees_its_row_within_the_step(llama: LoadedModel) -> None:
    decoder = decoder_of(llama, sequence("a", max_tokens=1), sequence("b"), max_running=1)
    [(first, _)] = decoder.step()
    assert (first.request_id, first.finish_reason) == ("a", "length")
    assert (decoder.num_running, decoder.num_waiting) == (0, 1)
    assert [s.request_id for s, _ in decoder.step()] == ["b"]


def test_an_end_token_finishes_and_is_the_last_token(llama: LoadedModel) -> None:
    probe = sequence("probe", max_tokens=6)
    decoder = decoder_of(llama, probe)
    while decoder.has_work():
        decoder.step()
    end = probe.tokens[3]
    again = sequence("again", max_tokens=6)
    again.end_ids = frozenset({end})
    decoder.add(again)
    while decoder.has_work():
        decoder.step()
    assert again.finish_reason == "stop"
    assert again.tokens == probe.tokens[: probe.tokens.index(end) + 1]


def test_arrivals_do_not_starve_the_running(llama: LoadedModel) -> None:
    old = sequence("old", max_tokens=6)
    decoder = decoder_of(llama, old)
    decoder.step()
    for arrival in range(3):
        decoder.add(sequence(f"new-{arrival}", max_tokens=50))
        before = len(old.tokens)
        decoder.step()
        decoder.step()
        assert len(old.tokens) > before


def test_dropping_frees_running_and_waiting(llama: LoadedModel) -> None:
    decoder = decoder_of(llama, *[sequence(name, max_tokens=50) for name in "abcd"], max_running=3)
    decoder.step()
    decoder.drop(lambda s: s.request_id in "ad")
    assert (decoder.num_running, decoder.num_waiting) == (2, 0)
    assert sorted(s.request_id for s, _ in decoder.step()) == ["b", "c"]


def test_choices_with_one_prefill_equal_choices_prefilled_alone(loaded: LoadedModel) -> None:
    def run(names: list[str]) -> list[list[int]]:
        sequences = [
            Sequence(
                name,
                tuple(range(5, 25)),
                8,
                frozenset(),
                TokenSampler(1.0, generator=seeded_generator(seed)),
                seed,
            )
            for seed, name in enumerate(names)
        ]
        decoder = decoder_of(loaded, *sequences)
        while decoder.has_work():
            decoder.step()
        return [s.tokens for s in sequences]

    shared = run(["a", "a", "a"])
    assert shared == run(["a", "b", "c"])
    assert len({tuple(tokens) for tokens in shared}) == 3


def test_a_poisoned_row_is_reported_and_its_neighbour_lives(llama: LoadedModel) -> None:
    bad, good = sequence("bad", max_tokens=9), sequence("good", prompt=(8, 9), max_tokens=9)
    decoder = decoder_of(llama, bad, good)
    decoder.step()
    decoder.batch.cache.layers[0].values[0].fill_(torch.nan)
    picks = {s.request_id: pick.token for s, pick in decoder.step()}
    assert picks["bad"] is None
    assert picks["good"] is not None
    alone = sequence("alone", prompt=(8, 9), max_tokens=9)
    decoder.add(alone)
    while decoder.has_work():
        decoder.step()
    assert good.tokens == alone.tokens
