"""Cores of a step: one is left while few rows of a fast model run, and every prompt and crowd has all."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from worker.serve.decoder import Decoder, Sequence
from worker.serve.loading import load_model
from worker.serve.sampling import Chooser
from worker.serve.threads import FAST_SECONDS, FEW_ROWS, StepThreads


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_a_core_is_left_to_a_fast_model_alone() -> None:
    threads = StepThreads.of_this_thread()
    assert (threads.num_all, threads.num_few) == (3, 3)
    threads.settle(FAST_SECONDS / 2)
    assert threads.num_few == 2
    threads.settle(FAST_SECONDS * 2)
    assert threads.num_few == 3
    torch.set_num_threads(1)
    alone = StepThreads.of_this_thread()
    alone.settle(FAST_SECONDS / 2)
    assert alone.num_few == 1


def test_each_step_takes_the_threads_of_its_rows(tiny_llama_dir: Path) -> None:
    threads = StepThreads(num_all=3, num_few=2)
    model = load_model(tiny_llama_dir).model
    decoder = Decoder(model, max_running=FEW_ROWS + 1, max_context_tokens=64, threads=threads)

    def used_after_joining(num_rows: int) -> list[int]:
        for _ in range(num_rows):
            decoder.add(Sequence("r", (1, 2, 3), max_tokens=16, end_ids=frozenset(), chooser=Chooser()))
        seen = []
        for _ in range(2):
            list(decoder.step())
            seen.append(torch.get_num_threads())
        return seen

    assert used_after_joining(FEW_ROWS) == [3, 2]  # the prompts, then a step
    assert used_after_joining(1) == [3, 3]
