"""Formats of the teacher's outputs in the row cache."""

# N rows (targets, in the order of the examples), T targets of one example, H hidden size,
# K tokens kept
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from worker.distill.losses.lm_head import ExpectedRows, Head, TeacherRows, expected_rows, top_rows
from worker.distill.losses.top_k import TopRows
from worker.host_copies import to_device

Keeps = Literal["hidden", "expected", "top"]


@dataclass(frozen=True)
class RowFormat:
    """Format of a row's blob: its tensors as bytes, one column after the other.

    - hidden: hidden states.
    - expected: KL constants, top tokens, expected head rows.
    - top: the most likely tokens, their log-probabilities, and that of all other tokens together.
    """

    keeps: Keeps
    width: int  # hidden size, or the number of tokens kept
    dtype: torch.dtype

    @property
    def columns(self) -> tuple[tuple[int, torch.dtype], ...]:
        """Numbers per position and dtype of each column."""
        match self.keeps:
            case "hidden":
                return ((self.width, self.dtype),)
            case "expected":
                return (1, torch.float32), (1, torch.int32), (self.width, self.dtype)
            case "top":
                return (self.width, torch.int32), (self.width, self.dtype), (1, self.dtype)

    def blob_bytes(self, num_positions: int) -> int:
        return num_positions * sum(width * dtype.itemsize for width, dtype in self.columns)

    def pack(self, hidden_TH: Tensor, head: Head) -> Tensor:
        """Returns the blob of a row, on the device of the hidden states."""
        return self._blob(self._tensors(hidden_TH, head))

    def pack_all(self, hidden: Sequence[Tensor], head: Head) -> list[Tensor]:
        """Returns the blobs of several rows from their hidden states [T, H].

        The head is read once for all of them, which is faster for short rows. The last bits of a
        row then depend on the others.
        """
        lengths = [len(hidden_TH) for hidden_TH in hidden]
        columns = [
            torch.split(values, lengths) for values in self._tensors(torch.cat(list(hidden)), head)
        ]
        return [self._blob(tensors) for tensors in zip(*columns, strict=True)]

    def _tensors(self, hidden_NH: Tensor, head: Head) -> tuple[Tensor, ...]:
        """Returns the values of each column."""
        if self.keeps == "hidden":
            return (hidden_NH,)
        if self.keeps == "expected":
            expected = expected_rows(hidden_NH, head)
            return expected.neg_entropy_N, expected.top_N, expected.head_NH
        top = top_rows(hidden_NH, head, self.width)
        return top.ids_NK, top.log_p_NK, top.log_rest_N

    def _blob(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(
            [
                _bytes(tensor, dtype)
                for tensor, (_, dtype) in zip(tensors, self.columns, strict=True)
            ]
        )

    def unpack(self, blobs: Sequence[Tensor], head: Head) -> TeacherRows:
        device = head.weight_VH.device
        tensors = [to_device(matrix, device) for matrix in self._matrices(blobs)]
        if self.keeps == "hidden":
            return TeacherRows(head, hidden_NH=tensors[0])
        if self.keeps == "expected":
            constants_N1, top_N1, head_NH = tensors
            return TeacherRows(
                head, expected=ExpectedRows(head_NH, constants_N1[:, 0], top_N1[:, 0].long())
            )
        ids_NK, log_p_NK, rest_N1 = tensors
        return TeacherRows(head, top=TopRows(ids_NK.long(), log_p_NK, rest_N1[:, 0]))

    def _matrices(self, blobs: Sequence[Tensor]) -> list[Tensor]:
        """Returns one matrix per column, over the positions of all blobs."""
        lengths = [len(blob) // self.blob_bytes(1) for blob in blobs]
        matrices = []
        starts = [0] * len(blobs)
        for width, dtype in self.columns:
            stops = [
                start + n * width * dtype.itemsize for start, n in zip(starts, lengths, strict=True)
            ]
            parts = [
                blob[start:stop] for blob, start, stop in zip(blobs, starts, stops, strict=True)
            ]
            matrices.append(torch.cat([part.view(dtype).view(-1, width) for part in parts]))
            starts = stops
        return matrices


def _bytes(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).contiguous().view(-1).view(torch.uint8)
