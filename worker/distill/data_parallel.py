"""Several processes that train one student: each takes its share of every batch, and the gradients are summed.

All of them keep the same weights, moments and state, so whoever speaks or writes files speaks for all: the first one.
What decides anything that all do is summed, so that no two of them part. Small sums run between CPUs (gloo), gradients
between cards (NCCL). Nothing here waits for a process that died: whoever started them ends them all.
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

PATIENCE = timedelta(days=7)  # the others wait while the first has the teacher answer, or judges
BUCKET_VALUES = 2**24  # of gradients that are summed at once; a copy of so many is made

T = TypeVar("T")
Json = dict[str, Any]  # Any: open-ended JSON


@dataclass(frozen=True)
class Ranks:
    """This process's number among `count`. With one process every method does nothing, at no cost."""

    number: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.number == 0

    def share(self, numbers: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """This process's part of a batch: the longest rows first, each to whoever has the fewest tokens so far.

        May be empty. The order within it is the batch's.
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
        """Each value summed over the processes."""
        if self.count == 1:
            return list(values)
        return [
            float(value) for value in self.sum_tensor(torch.tensor(values, dtype=torch.float64))
        ]

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, is_true: bool) -> bool:
        """Whether it is true in some process."""
        return self.sum(float(is_true))[0] > 0

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Gives every process the sum of the gradients; none stays none where no process has one."""
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
        """Until all are here."""
        self.sum(0.0)

    def from_first(self, work: Callable[[], Json]) -> Json:
        """What the work gives, which the first alone does; the others are told."""
        if self.count == 1:
            return work()
        text = json.dumps(work()).encode() if self.is_first else b""
        num_bytes = int(self.sum(len(text))[0])
        letters = torch.tensor(list(text) or [0] * num_bytes, dtype=torch.uint8)
        dist.broadcast(letters, src=0)
        told: Json = json.loads(bytes(letters.tolist()))
        return told

    def first_then_others(self, work: Callable[[], T]) -> T:
        """Work that leaves something on disk: done by the first, then by the others, who find it there."""
        if self.is_first:
            done = work()
            self.wait()
            return done
        self.wait()
        return work()


ALONE = Ranks()


def join(number: int, count: int, meeting: Path) -> Ranks:
    """Meets the other processes by way of a file; returns when all are there."""
    # torch does not say that it exports it
    store = dist.FileStore(str(meeting), count)  # type: ignore[attr-defined]
    has_card = torch.cuda.device_count() >= count  # NCCL does not share one
    backend = "cpu:gloo,cuda:nccl" if has_card else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
    return Ranks(number, count)


def leave() -> None:
    """To be called at the end, or torch complains."""
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
