"""Stands for a recorder of CUDA graphs on a CPU.

Like a graph, a replay repeats operations on the same tensors, with the numbers of the recording.
It therefore gives wrong results where a region reads a number that differs between steps, or a
tensor whose address has changed. Reading a value on the host is an error, as it is on a GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from worker.serve.cuda_graphs import Region

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)


class OpRecorder:
    """Records the operations of regions. A replay runs them again.

    `failing` is the number of the recording that fails, as if the driver had refused it.
    """

    num_bytes = 1000

    def __init__(self, failing: int | None = None) -> None:
        self.failing = failing
        self.num_recorded = self.num_resets = 0

    def warm_up(self, region: Region) -> None:
        region()

    def record(self, region: Region) -> Region:
        self.num_recorded += 1
        if self.num_recorded == self.failing:
            raise RuntimeError("operation not permitted when stream is capturing")
        with _Recording() as recording:
            region()
        replay: Region = recording.replay
        return replay

    def reset(self) -> None:
        self.num_resets += 1


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:  # Any: PyTorch leaves the signature open
        if func in READS:
            raise RuntimeError(f"{func} reads a value while a graph is recorded")
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                # views and results of operations in place have the memory of the recording already
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
