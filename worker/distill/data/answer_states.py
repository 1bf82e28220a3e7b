"""LM head inputs that the teacher computed while it answered, kept for the row cache.

The teacher computes them for each token that it generates. With them, it need not read its own
answers once more before the student learns from them.
"""

# T tokens of an answer, H hidden size
import os
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from worker.disk import is_disk_full


class AnswerStates:
    """States by the key of their answer, in a temporary file without a name.

    When the file has `budget_bytes`, or the disk is full, further states are not kept.
    """

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        self._file, path = tempfile.mkstemp(dir=folder)
        os.unlink(path)  # the file ends with this object, also if the process is killed
        weakref.finalize(self, os.close, self._file)
        self._budget_bytes = budget_bytes
        self._num_bytes = 0
        self._places: dict[str, tuple[int, int, int]] = {}  # offset, T, H

    def __len__(self) -> int:
        return len(self._places)

    def put(self, key: str, states_TH: Tensor) -> None:
        """Keeps the float32 states of an answer."""
        data = states_TH.contiguous().view(-1).view(torch.uint8).numpy().data
        if self._num_bytes + len(data) > self._budget_bytes:
            return
        try:
            is_stored = os.pwrite(self._file, data, self._num_bytes) == len(data)
        except OSError as error:
            if not is_disk_full(error):
                raise
            is_stored = False
        if not is_stored:
            self._budget_bytes = 0
            return
        num_tokens, width = states_TH.shape
        self._places[key] = (self._num_bytes, num_tokens, width)
        self._num_bytes += len(data)

    def get(self, key: str, num_tokens: int) -> Tensor | None:
        """Returns the states [T, H] of the first `num_tokens` of an answer, if they were kept."""
        offset, num_kept, width = self._places.get(key, (0, 0, 0))
        if num_kept < num_tokens:
            return None
        states_TH = torch.empty(num_tokens, width)
        data = states_TH.view(-1).view(torch.uint8).numpy().data
        num_read = os.preadv(self._file, [data], offset)
        return states_TH if num_read == len(data) else None
