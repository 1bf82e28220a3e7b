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
OURS = ("/worker/", "/app/")  # parts of the paths of this project's files


class OpLog(TorchDispatchMode):
    """Log of the operations within its block, which must be inside `fake_cuda`.

    A wait is a read of a value on the GPU, or a copy between CPU and GPU that is not asynchronous.
    A copy to the GPU is asynchronous only from pinned memory. `waits` has the line of our code for
    each. Reads return 1, because fake tensors have no values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.num_ops: Counter[tuple[str, str, str]] = Counter()  # by name, device and dtype

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:  # Any: PyTorch leaves the signature open
        """Records one operation and runs it."""
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self._read(args[0], func, args)
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                name = func.overloadpacket.__name__
                self.num_ops[name, tensor.device.type, str(tensor.dtype)] += 1
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

    def _read(self, tensor: Tensor, func: Any, args: Sequence[Any]) -> Any:
        if tensor.device.type == "cuda":
            self.waits.append(_line_of_ours())
        elif getattr(tensor, "constant", None) is not None:
            return func(*args)
        return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1

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
