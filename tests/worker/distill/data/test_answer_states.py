import errno
import os
from pathlib import Path

import pytest
import torch

from worker.distill.data.answer_states import AnswerStates

ONE_TH = torch.arange(12.0).view(4, 3)


def test_states_are_returned_as_they_were_put(tmp_path: Path) -> None:
    states = AnswerStates(tmp_path, budget_bytes=2**20)
    states.put("one", ONE_TH)
    states.put("two", ONE_TH[:, :2] + 100)  # not contiguous
    for key, expected_TH in (("one", ONE_TH), ("two", ONE_TH[:, :2] + 100)):
        found_TH = states.get(key, 4)
        assert found_TH is not None
        assert torch.equal(found_TH, expected_TH)
    assert len(states) == 2


def test_a_cut_answer_has_the_first_states(tmp_path: Path) -> None:
    states = AnswerStates(tmp_path, budget_bytes=2**20)
    states.put("one", ONE_TH)
    found_TH = states.get("one", 2)
    assert found_TH is not None
    assert torch.equal(found_TH, ONE_TH[:2])
    assert states.get("one", 5) is None
    assert states.get("other", 1) is None


def test_states_beyond_the_budget_are_not_kept(tmp_path: Path) -> None:
    states = AnswerStates(tmp_path, budget_bytes=ONE_TH.nbytes + 4)
    states.put("one", ONE_TH)
    states.put("two", ONE_TH)
    assert states.get("one", 4) is not None
    assert states.get("two", 4) is None


def test_a_full_disk_ends_the_keeping_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    states = AnswerStates(tmp_path, budget_bytes=2**20)
    states.put("one", ONE_TH)
    monkeypatch.setattr(os, "pwrite", refuse)
    states.put("two", ONE_TH)
    monkeypatch.undo()
    states.put("three", ONE_TH)
    found_TH = states.get("one", 4)
    assert found_TH is not None
    assert torch.equal(found_TH, ONE_TH)
    assert states.get("two", 4) is None
    assert states.get("three", 4) is None


def test_the_file_has_no_name(tmp_path: Path) -> None:
    states = AnswerStates(tmp_path, budget_bytes=2**20)
    states.put("one", ONE_TH)
    assert not list(tmp_path.iterdir())
