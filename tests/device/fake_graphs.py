"""CUDA streams and graphs for code that runs inside `fake_cuda`, without a driver.

A graph observes what is recorded: waits of the host, and operations that ran on the CPU. Neither
would be repeated by a replay.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch

from tests.device.op_log import OpLog

SEGMENT_BYTES = 20 * 2**20


class FakeStream:
    """Stands for a stream."""

    def wait_stream(self, other: "FakeStream") -> None:
        """All operations run in the order of the program."""


class FakeGraph:
    """Stands for a CUDA graph. `recorded` has the operations of all graphs."""

    recorded: list[OpLog] = []
    num_replays = 0

    def capture_begin(self, *, pool: object, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        self._log = OpLog()
        self._log.__enter__()

    def capture_end(self) -> None:
        self._log.__exit__(None, None, None)
        FakeGraph.recorded.append(self._log)

    def replay(self) -> None:
        FakeGraph.num_replays += 1


@contextmanager
def fake_graphs() -> Iterator[type[FakeGraph]]:
    """Replaces streams and graphs within the block."""
    answers: dict[str, Any] = {  # Any: functions and classes of torch.cuda
        "Stream": FakeStream,
        "stream": lambda stream: nullcontext(),
        "current_stream": FakeStream,
        "CUDAGraph": FakeGraph,
        "graph_pool_handle": lambda: (0, 1),
    }
    segments = [{"total_size": SEGMENT_BYTES}]
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(
            patch.object(torch.cuda.memory, "memory_snapshot", lambda *_, **__: segments)
        )
        stack.enter_context(patch.object(FakeGraph, "recorded", []))
        stack.enter_context(patch.object(FakeGraph, "num_replays", 0))
        yield FakeGraph
