"""The teacher's side of the loss: its last hidden states at completion positions, computed once and kept on disk.

B batch, T tokens, N rows (completion positions, in the order of hidden_BTH[keep_mask_BT]), H hidden width.
"""

import gc
import hashlib
import json
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from worker.distill.cache import RowCache, cache_bytes, open_cache
from worker.distill.heads import ExpectedRows, Head, TeacherRows, expected_rows

CacheRow = tuple[Sequence[int], Sequence[int]]  # token ids, kept positions (each predicts the token after it)
Keeps = Literal["hidden", "expected"]


class LiveTeacher:
    """The teacher's body, run on the rows one asks for.

    On a CPU each sequence is computed alone and without padding: a few per cent slower, but a row's bits then depend
    on nothing but the row, so a run that resumes, or finds its cache half filled, computes what it would have read.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._body = model.base_model.eval()

    @torch.no_grad()
    def hidden(self, input_ids_BT: Tensor, attention_mask_BT: Tensor, keep_mask_BT: Tensor) -> list[Tensor]:
        """For each sequence the hidden states of its kept positions, after the final norm."""
        if input_ids_BT.device.type != "cpu":
            hidden_BTH = self._forward(input_ids_BT, attention_mask_BT)
            return [h_TH[keep_T] for h_TH, keep_T in zip(hidden_BTH, keep_mask_BT, strict=True)]
        kept = []
        for ids_T, is_real_T, keep_T in zip(
            input_ids_BT, attention_mask_BT.bool(), keep_mask_BT, strict=True
        ):
            hidden_1TH = self._forward(ids_T[is_real_T][None], None)
            kept.append(hidden_1TH[0, keep_T[is_real_T]])
        return kept

    def _forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None) -> Tensor:
        output = self._body(input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False)
        hidden_BTH: Tensor = output.last_hidden_state
        return hidden_BTH


class RowFormat:
    """How a row's tensors become a blob: hidden states, or [KL constants, top tokens, expected head rows]."""

    def __init__(self, keeps: Keeps, hidden_size: int, dtype: torch.dtype) -> None:
        self.keeps = keeps
        self.dtype = dtype
        self._hidden_size = hidden_size

    def blob_bytes(self, num_positions: int) -> int:
        constants = 8 if self.keeps == "expected" else 0
        return num_positions * (constants + self._hidden_size * self.dtype.itemsize)

    def pack(self, hidden_TH: Tensor, head: Head) -> Tensor:
        if self.keeps == "hidden":
            return _bytes(hidden_TH, self.dtype)
        expected = expected_rows(hidden_TH, head)
        constants = [_bytes(expected.neg_entropy_N, torch.float32), _bytes(expected.top_N, torch.int32)]
        return torch.cat([*constants, _bytes(expected.head_NH, self.dtype)])

    def unpack(self, blobs: Sequence[Tensor], head: Head) -> TeacherRows:
        device = head.weight_VH.device
        if self.keeps == "hidden":
            return TeacherRows(head, hidden_NH=self._matrix(blobs).to(device))
        lengths = [len(blob) // self.blob_bytes(1) for blob in blobs]
        expected = ExpectedRows(
            neg_entropy_N=torch.cat(
                [b[: 4 * n].view(torch.float32) for b, n in zip(blobs, lengths, strict=True)]
            ),
            top_N=torch.cat(
                [b[4 * n : 8 * n].view(torch.int32) for b, n in zip(blobs, lengths, strict=True)]
            ).long(),
            head_NH=self._matrix([b[8 * n :] for b, n in zip(blobs, lengths, strict=True)]),
        )
        return TeacherRows(head, expected=expected.to(device))

    def _matrix(self, blobs: Sequence[Tensor]) -> Tensor:
        return torch.cat([blob.view(self.dtype).view(-1, self._hidden_size) for blob in blobs])


class CachedTeacher:
    """Teacher rows from the cache; a missing one is computed by the live teacher and stored.

    What training sees has been through the cache's precision either way, so it never depends on who came first.
    The live teacher is loaded when a row is missing and let go when none is.
    """

    def __init__(
        self,
        load: Callable[[], PreTrainedModel],
        head: Head,
        cache: RowCache | None,
        row_format: RowFormat | None,
    ) -> None:
        self._load = load
        self._head = head
        self._cache = cache
        self._format = row_format
        self._live: LiveTeacher | None = None

    @property
    def is_loaded(self) -> bool:
        """Whether the live teacher takes memory now."""
        return self._live is not None

    def rows(
        self, indices: Sequence[int], input_ids_BT: Tensor, attention_mask_BT: Tensor, keep_mask_BT: Tensor
    ) -> TeacherRows:
        """The batch's kept rows; indices are the numbers of its sequences among the rows the cache was made for."""
        if self._format is None:
            hidden = self._live_teacher().hidden(input_ids_BT, attention_mask_BT, keep_mask_BT)
            return TeacherRows(self._head, hidden_NH=torch.cat(hidden))
        found = {
            b: blob for b, i in enumerate(indices) if self._cache and (blob := self._cache.get(i)) is not None
        }
        missing = [b for b in range(len(indices)) if b not in found]
        if missing:
            hidden = self._live_teacher().hidden(
                input_ids_BT[missing], attention_mask_BT[missing], keep_mask_BT[missing]
            )
            for b, hidden_TH in zip(missing, hidden, strict=True):
                found[b] = self._format.pack(hidden_TH, self._head)
                if self._cache:
                    self._cache.put(indices[b], found[b])
        if self._cache and self._cache.num_missing == 0 and self._live:
            self._live = None
            gc.collect()  # modules refer to each other in cycles; their memory is wanted now
        return self._format.unpack([found[b] for b in range(len(indices))], self._head)

    def close(self) -> None:
        if self._cache:
            self._cache.close()
        self._cache = None
        self._live = None

    def _live_teacher(self) -> LiveTeacher:
        if self._live is None:
            self._live = LiveTeacher(self._load())
        return self._live


def cached_teacher(
    load: Callable[[], PreTrainedModel],
    head: Head,
    *,
    folder: Path,
    budget_bytes: int,
    identity: str,
    rows: Sequence[CacheRow],
    keeps: Keeps = "hidden",
) -> CachedTeacher:
    """A teacher for these data rows, cached under `folder` in the finest precision that the budget allows.

    That is the head's own (float32 on a CPU) or else bfloat16; with room for neither, the teacher runs every time.
    `identity` says whose rows they are: hashes of the teacher's weights and its tokenizer.
    keeps="expected" needs a student whose frozen head is the teacher's, and forward KL at temperature 1 throughout.
    """
    hidden_size = head.weight_VH.shape[1]
    for dtype in (head.weight_VH.dtype, torch.bfloat16):
        row_format = RowFormat(keeps, hidden_size, dtype)
        sizes = [row_format.blob_bytes(len(kept)) for _, kept in rows]
        if cache_bytes(sizes) <= budget_bytes:
            key = _cache_key(identity, rows, row_format, head)
            cache = open_cache(folder, key, sizes, budget_bytes=budget_bytes)
            return CachedTeacher(load, head, cache, row_format)
    return CachedTeacher(load, head, None, None)


def _cache_key(identity: str, rows: Sequence[CacheRow], row_format: RowFormat, head: Head) -> str:
    """Hash of all that determines the cached bytes; threads and device do, by the order of their sums."""
    settings = {
        "identity": identity,
        "keeps": row_format.keeps,
        "dtype": str(row_format.dtype),
        "head": [*head.weight_VH.shape, str(head.weight_VH.dtype)],
        "device": head.weight_VH.device.type,
        "num_threads": torch.get_num_threads(),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for token_ids, kept in rows:
        digest.update(array("q", [len(token_ids), *token_ids, len(kept), *kept]).tobytes())
    return digest.hexdigest()


def _bytes(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to("cpu", dtype).contiguous().view(-1).view(torch.uint8)
