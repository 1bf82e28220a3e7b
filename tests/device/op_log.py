"""Records operations with their devices and dtypes, and counts waits of the host for the GPU."""

import traceback
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.device.fake_cuda import PINNED

aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
OURS = ("/worker/", "/app/")  # parts of the paths of this project's files


class OpLog(TorchDispatchMode):
    """Log of the operations within its block, which must be inside `fake_cuda`.

    `truth` is the result of reading a boolean.

    A wait is a read of a value on the GPU, or a copy between CPU and GPU that is not asynchronous.
    A copy to the GPU is asynchronous only from pinned memory. To index by a boolean mask or by a
    list also waits. `waits` has the line of our code for each. Reads return 1, because fake tensors
    have no values.
    """

    def __init__(self, *, truth: bool = True) -> None:
        super().__init__()
        self.truth = truth
        self.waits: list[str] = []
        self.num_ops: Counter[tuple[str, str, str]] = Counter()  # by name, device and dtype
        self.shapes: list[tuple[str, tuple[int, ...]]] = []  # of the results on the GPU

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:  # Any: PyTorch leaves the signature open
        """Records one operation and runs it."""
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self._read(args[0], func, args)
        if func is aten.nonzero.default and args[0].device.type == "cpu":
            return torch.zeros(args[0].numel(), args[0].dim(), dtype=torch.int64)  # all of them
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                name = func.overloadpacket.__name__
                self.num_ops[name, tensor.device.type, str(tensor.dtype)] += 1
                if tensor.device.type == "cuda":
                    self.shapes.append((name, tuple(tensor.shape)))
        if func in INDEXING:
            self._index(args)
        if func is aten._to_copy.default:
            self._copy(args[0], result, is_async=bool(kwargs.get("non_blocking")))
        elif func is aten.copy_.default:
            is_async = bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking"))
            self._copy(args[1], args[0], is_async=is_async)
        return result

    def num_of_dtypes(self, name: str, device: str = "cuda") -> dict[str, int]:
        """Returns how often an operation returned each dtype on a device."""
        return {
            dtype: num
            for (op, at, dtype), num in self.num_ops.items()
            if (op, at) == (name, device)
        }

    def devices_of(self, name: str) -> list[str]:
        """Returns the devices on which an operation ran."""
        return sorted({at for op, at, _ in self.num_ops if op == name})

    def _index(self, args: Sequence[Any]) -> None:
        """Indices on the CPU are copied, and the host must count those of a boolean mask."""
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        if args[0].device.type != "cuda":
            return
        is_filled = len(args) > 2 and args[2].numel() == 1  # runs as masked_fill
        is_counted = any(index.dtype == torch.bool for index in indices) and not is_filled
        if is_counted or any(index.device.type == "cpu" for index in indices):
            self.waits.append(_line_of_ours())

    def _read(self, tensor: Tensor, func: Any, args: Sequence[Any]) -> Any:
        if tensor.device.type == "cuda":
            self.waits.append(_line_of_ours())
        elif getattr(tensor, "constant", None) is not None:
            return func(*args)
        return (
            self.truth if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1
        )

    def _copy(self, source: Tensor, target: Tensor, *, is_async: bool) -> None:
        if source.device.type == target.device.type:
            return
        is_pinned = source.device.type == "cuda" or getattr(source, PINNED, False)
        if not (is_async and is_pinned):
            self.waits.append(_line_of_ours())


def _line_of_ours() -> str:
    """Returns the innermost line of this project on the stack, without the tests."""
    for frame in reversed(traceback.extract_stack()):
        if any(part in frame.filename for part in OURS) and "/tests/" not in frame.filename:
            path = (
                frame.filename[frame.filename.index("/worker/") + 1 :]
                if "/worker/" in frame.filename
                else frame.filename
            )
            return f"{path}:{frame.lineno} {frame.line}"
    return "outside of this project"
