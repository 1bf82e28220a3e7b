"""CUDA graphs of a computation that reads and writes tensors at fixed addresses.

A CUDA graph is a recorded sequence of kernels. The host starts all of them by one call, which takes
less time than one call per kernel.
"""

from collections.abc import Callable, Hashable
from typing import Any, Final, Protocol

import structlog
import torch

log = structlog.get_logger(__name__)

MAX_GRAPHS: Final = 48
# Memory of one graph in the driver, beside that of its tensors. An assumption: about 600 kernels.
DRIVER_BYTES: Final = 4 * 2**20
# Memory that is kept free for graphs that have not been recorded yet.
RESERVED_BYTES: Final = 512 * 2**20
# With less free memory than this, PyTorch's unused memory is freed before a graph is recorded. A
# recording cannot do that itself.
LEAST_FREE_BYTES: Final = 2**30

Region = Callable[[], None]


class Recorder(Protocol):
    """Records regions, which must not read values of the device on the host."""

    def warm_up(self, region: Region) -> None:
        """Runs a region as it will be recorded, so that libraries allocate their work space."""
        ...

    def record(self, region: Region) -> Region:
        """Records a region without running it. Returns the function that replays it."""
        ...

    def reset(self) -> None:
        """Must be called after all recordings were dropped, before the next one."""
        ...

    @property
    def num_bytes(self) -> int:
        """Memory that the recordings share for their tensors."""
        ...


class CudaRecorder:
    """Records CUDA graphs on a stream of their own. They share one pool of memory.

    The graphs must be replayed one at a time, because they overwrite each other's tensors.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, region: Region) -> None:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            region()
        current.wait_stream(self._stream)

    def record(self, region: Region) -> Region:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        if torch.cuda.mem_get_info()[0] < LEAST_FREE_BYTES:
            torch.cuda.empty_cache()
        # Not `torch.cuda.graph`: after a failure it would leave its stream the current one.
        with torch.cuda.stream(self._stream):
            # other threads, which load models, may allocate memory meanwhile
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                region()
            finally:
                graph.capture_end()
        return graph.replay

    def reset(self) -> None:
        # the allocator refuses a pool that has no graph any more
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def num_bytes(self) -> int:
        snapshot: Any = torch.cuda.memory.memory_snapshot  # torch leaves it untyped
        segments = snapshot(self._pool, include_traces=False)
        return sum(segment["total_size"] for segment in segments)


class GraphCache:
    """Recordings by key, of which the least recently used are dropped.

    A region runs plainly the first time, and is recorded the second time. If that fails, a warning
    is logged, all recordings are dropped, and `is_off` is true.
    """

    def __init__(self, recorder: Recorder, *, max_graphs: int = MAX_GRAPHS) -> None:
        self.is_off = False
        self.num_recorded = self.num_replayed = 0
        self._recorder = recorder
        self._max_graphs = max_graphs
        self._num_pool_bytes = 0
        self._warm: set[Hashable] = set()
        self._replays: dict[Hashable, Region] = {}  # the most recently used one is the last

    def __len__(self) -> int:
        return len(self._replays)

    @property
    def num_bytes(self) -> int:
        return self._num_pool_bytes + DRIVER_BYTES * len(self._replays)

    @property
    def reserved_bytes(self) -> int:
        """Memory to leave free: that of the graphs, or a reserve if there are few yet."""
        return 0 if self.is_off else max(RESERVED_BYTES, self.num_bytes)

    def run(self, key: Hashable, region: Region) -> None:
        """Runs a region once, by a replay if possible. Regions of equal keys must be equal."""
        replay = self._replays.pop(key, None)
        if replay is None and key not in self._warm and not self.is_off:
            self._recorder.warm_up(region)
            self._warm.add(key)
            return
        if replay is None:
            replay = self._record(region)
        if replay is None:
            region()
            return
        self._replays[key] = replay
        self.num_replayed += 1
        replay()

    def clear(self) -> None:
        """Drops all recordings. Must be called when the addresses of their tensors change."""
        self._warm.clear()
        if self._replays:
            self._replays.clear()
            self._recorder.reset()
        self._num_pool_bytes = 0

    def _record(self, region: Region) -> Region | None:
        if self.is_off:
            return None
        while len(self._replays) >= self._max_graphs:
            oldest = next(iter(self._replays))
            del self._replays[oldest]
            self._warm.discard(oldest)
        try:
            replay = self._recorder.record(region)
            self._num_pool_bytes = self._recorder.num_bytes
        except RuntimeError as error:  # also of the driver, and if memory is exhausted
            self.is_off = True
            self.clear()
            log.warning("cuda_graphs_off", reason=str(error), cause=str(error.__context__ or ""))
            return None
        self.num_recorded += 1
        return replay
