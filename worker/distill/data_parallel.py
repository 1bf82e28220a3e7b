"""Data-parallel training of one student by several processes (ranks).

Each rank computes the gradient of its part of every batch, and the gradients are summed. All ranks
hold the same weights, optimizer moments and state, so only the first rank reports progress and
writes files. Values that decide what all ranks do next are summed first, so that all ranks decide
alike.

Small sums run between CPUs (gloo), and gradients between GPUs (NCCL). Nothing here detects that a
rank has died: the process that started the ranks must end them all.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

# timeout of a collective; the others wait while the first generates answers or evaluates
PATIENCE = timedelta(days=7)
BUCKET_VALUES = 2**24  # number of gradient values per all-reduce; each one copies so many

T = TypeVar("T")
Json = dict[str, Any]  # Any: open-ended JSON


@dataclass(frozen=True)
class Ranks:
    """Number of this process among `count`. With one process, every method returns at once."""

    number: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.number == 0

    def share(self, numbers: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Returns the part of a batch that this rank computes, in the batch's order.

        Rows are assigned from the longest to the shortest, each to the rank with the fewest tokens
        so far. The part may be empty.
        """
        if self.count == 1:
            return list(numbers)
        loads = [0] * self.count
        mine = set()
        for place in sorted(
            range(len(numbers)), key=lambda place: (-lengths[numbers[place]], place)
        ):
            rank = min(range(self.count), key=lambda rank: (loads[rank], rank))
            loads[rank] += lengths[numbers[place]]
            if rank == self.number:
                mine.add(place)
        return [number for place, number in enumerate(numbers) if place in mine]

    def sum(self, *values: float) -> list[float]:
        """Returns each value summed over the ranks."""
        if self.count == 1:
            return list(values)
        return [
            float(value) for value in self.sum_tensor(torch.tensor(values, dtype=torch.float64))
        ]

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the ranks, in place, and returns it."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, is_true: bool) -> bool:
        """Returns whether the value is true in at least one rank."""
        return self.sum(float(is_true))[0] > 0

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replaces the gradients of every rank by their sum.

        A parameter that has no gradient in any rank keeps `grad = None`.
        """
        if self.count == 1:
            return
        have = self.sum_tensor(
            torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32)
        )
        wanted = [p for p, num in zip(parameters, have.tolist(), strict=True) if num]
        for bucket in _buckets(wanted):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = self.sum_tensor(torch.cat([grad.reshape(-1) for grad in grads]))
            for parameter, summed in zip(
                bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True
            ):
                parameter.grad = summed.view_as(parameter)

    def wait(self) -> None:
        """Blocks until all ranks have called it."""
        self.sum(0.0)

    def from_first(self, work: Callable[[], Json]) -> Json:
        """Runs `work` in the first rank alone and returns its result, JSON, in every rank."""
        if self.count == 1:
            return work()
        text = json.dumps(work()).encode() if self.is_first else b""
        num_bytes = int(self.sum(len(text))[0])
        letters = torch.tensor(list(text) or [0] * num_bytes, dtype=torch.uint8)
        dist.broadcast(letters, src=0)
        told: Json = json.loads(bytes(letters.tolist()))
        return told

    def first_then_others(self, work: Callable[[], T]) -> T:
        """Runs `work` in the first rank, and then in the others, and returns its result.

        It is for work that leaves files on disk, which the other ranks then reuse.
        """
        if self.is_first:
            done = work()
            self.wait()
            return done
        self.wait()
        return work()


ALONE = Ranks()


def join(number: int, count: int, meeting: Path) -> Ranks:
    """Connects the ranks through the file `meeting`, and returns when all of them are connected."""
    # PyTorch does not list FileStore among its exports.
    store = dist.FileStore(str(meeting), count)  # type: ignore[attr-defined]
    has_card = torch.cuda.device_count() >= count  # NCCL needs a GPU per rank
    backend = "cpu:gloo,cuda:nccl" if has_card else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
    return Ranks(number, count)


def leave() -> None:
    """Closes the process group, if there is one. PyTorch warns if it is still open at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    num_values = 0
    for parameter in parameters:
        if bucket and num_values + parameter.numel() > BUCKET_VALUES:
            yield bucket
            bucket, num_values = [], 0
        bucket.append(parameter)
        num_values += parameter.numel()
    if bucket:
        yield bucket
