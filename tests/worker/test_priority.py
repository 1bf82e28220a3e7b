"""A thread that steps back does so alone, with what it starts, and never forward again."""

import os
import sys
import threading

import pytest

from worker.priority import SERVING, TRAINING, step_back

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads have a niceness on Linux alone")


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_the_others_stay_where_they_were() -> None:
    before, seen = niceness(), []

    def work() -> None:
        step_back(TRAINING)
        child = threading.Thread(target=lambda: seen.append(niceness()))
        child.start()
        child.join()
        step_back(SERVING)
        seen.append(niceness())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [max(before, TRAINING)] * 2
    assert niceness() == before
