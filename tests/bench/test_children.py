"""Processes of the bench."""

import sys
from pathlib import Path

import pytest

from bench.children import ChildFailed, ask_child

ANSWERS = (
    "import json, os, sys; task = json.load(open(sys.argv[1])); "
    "json.dump({'x': task['x'], 'threads': os.environ['OMP_NUM_THREADS']}, open(task['answer'], 'w'))"
)


def test_a_child_is_asked_and_answers(tmp_path: Path) -> None:
    task = {"work": str(tmp_path), "num_threads": 3, "x": 5}
    assert ask_child([sys.executable, "-c", ANSWERS], task) == {"x": 5, "threads": "3"}
    assert list((tmp_path / "tasks").iterdir()) == []


def test_a_child_that_fails_says_why(tmp_path: Path) -> None:
    task = {"work": str(tmp_path), "num_threads": 1}
    with pytest.raises(ChildFailed, match="no such luck"):
        ask_child([sys.executable, "-c", "raise SystemExit('no such luck')"], task)
