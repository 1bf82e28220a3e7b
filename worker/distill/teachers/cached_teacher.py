"""Teacher outputs that a loss needs at the targets, computed once and kept on disk.

N rows (targets, in the order of the examples), T targets of one example, H hidden size.
"""

import gc
import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from app.contracts.batch_plan import cut_batches
from worker.cpu import fuse_layers
from worker.distill.data.batching import collate
from worker.distill.data.rows import Example
from worker.distill.data_parallel import Ranks
from worker.distill.forward.hidden_states import decoder_states, select, transform_of
from worker.distill.forward.shared_prefix import Prefix
from worker.distill.losses.lm_head import Head, TeacherRows
from worker.distill.phase_times import PhaseTimes
from worker.distill.teachers.row_cache import NAME_BYTES, RowCache, cache_bytes, open_cache
from worker.distill.teachers.row_format import Keeps, RowFormat
from worker.host_copies import to_device

KEPT_AT_ONCE = 1024  # positions that `CachedTeacher.keep` packs in one pass over the head
TOP_K = 64  # most likely tokens kept per target; a peaked distribution has little mass elsewhere


class Teacher(Protocol):
    """Interface of a model that computes hidden states for any examples."""

    def hidden(self, examples: Sequence[Example]) -> list[Tensor]:
        """Returns the LM head's inputs at the targets of each example, [T, H]."""
        ...


class LiveTeacher:
    """Teacher that predicts from left to right, with or without an encoder.

    On a CPU each sequence is computed alone, without padding, on one thread; as many run at once as
    there are threads. This is as fast as a padded batch (bench/LOG.md), and the bits of a row
    depend on that row alone. A run that resumes, or finds a half-filled cache, therefore computes
    what it would have read, unless the row was kept while the teacher answered. The prefix of all
    rows is computed once. Its length is part of the cache's name, because it changes the last bits.
    """

    def __init__(self, model: PreTrainedModel, prefix: tuple[int, ...] = ()) -> None:
        self._model = model.eval()
        self._device = str(model.device)
        fuse_layers(model)
        self._threads = ThreadPoolExecutor(
            torch.get_num_threads(), "teacher", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._prefix: Prefix | None = None
        window = getattr(model.config, "sliding_window", None)
        if prefix and self._device == "cpu" and (window is None or window > len(prefix)):
            self._prefix = self._threads.submit(Prefix, model, prefix).result()

    def hidden(self, examples: Sequence[Example]) -> list[Tensor]:
        if self._device != "cpu":
            return self._batch(examples)
        longest_first = sorted(range(len(examples)), key=lambda i: -examples[i].num_tokens)
        running = {i: self._threads.submit(self._row, examples[i]) for i in longest_first}
        return [running[i].result() for i in range(len(examples))]

    @torch.no_grad()
    def _row(self, example: Example) -> Tensor:
        if self._prefix is None or not self._prefix.begins(example):
            return self._batch([example])[0]
        return transform_of(self._model)(self._prefix.states(example))

    @torch.no_grad()
    def _batch(self, examples: Sequence[Example]) -> list[Tensor]:
        batch = collate(examples, range(len(examples)), self._device)
        states_BTH = decoder_states(self._model, batch)
        hidden_NH = transform_of(self._model)(select(states_BTH, batch.positions_N))
        return list(torch.split(hidden_NH, [example.num_targets for example in examples]))


class CachedTeacher:
    """Teacher rows from the cache; the live teacher computes missing ones, which are then stored.

    `examples` are the rows as the teacher reads them. They may differ from the student's, but have
    the same targets. All rows pass through the cache's dtype, so training does not depend on which
    of them were cached. The live teacher is loaded when a row is missing, and released when none
    is.
    """

    def __init__(
        self,
        load: Callable[[], Teacher],
        head: Head,
        examples: Sequence[Example],
        cache: RowCache | None,
        row_format: RowFormat | None,
        note: str | None = None,
        masks: Sequence[Tensor] | None = None,
    ) -> None:
        """Creates a teacher without loading a model.

        `note` tells the user what the format loses. `masks` selects the student's targets that the
        rows are for; None selects all.
        """
        self.notes = [note] if note else []  # for the user to know
        self.phases = PhaseTimes()
        self._masks = masks
        self._load = load
        self._head = head
        self._examples = examples
        self._cache = cache
        self._format = row_format
        self._live: Teacher | None = None
        self._is_kept = False
        self.num_computed = 0
        self.num_kept = 0  # rows stored by `keep`

    @property
    def head(self) -> Head:
        """The teacher's LM head in float32, where the loss is computed."""
        return self._head

    @property
    def is_cached(self) -> bool:
        """True if the disk has room for all rows."""
        return self._cache is not None

    @property
    def has_all_rows(self) -> bool:
        """True if no row was missing in the cache when it was last read or written."""
        return self._cache is not None and self._cache.num_missing == 0

    @property
    def is_loaded(self) -> bool:
        """True if the live teacher is in memory."""
        return self._live is not None

    def rows(self, indices: Sequence[int]) -> TeacherRows:
        """Returns the teacher rows of the examples with these indices."""
        rows = self._rows(indices)
        if self._masks is None:
            return rows
        return replace(rows, mask_N=torch.cat([self._masks[i] for i in indices]))

    def _rows(self, indices: Sequence[int]) -> TeacherRows:
        if self._format is None:
            return self.rows_of([self._examples[i] for i in indices])
        found = {
            i: blob for i in indices if self._cache and (blob := self._cache.get(i)) is not None
        }
        missing = [i for i in dict.fromkeys(indices) if i not in found]
        if missing:
            with self.phases.phase("teacher"):
                found |= self._computed(missing, self._format)
        if self._cache and self._cache.num_missing == 0 and self._live and not self._is_kept:
            self.release()
        return self._format.unpack([found[i] for i in indices], self._head)

    def _computed(self, missing: Sequence[int], row_format: "RowFormat") -> dict[int, Tensor]:
        """Computes and stores missing rows, and returns their blobs."""
        computed = self._compute([self._examples[i] for i in missing])
        blobs = on_cpu([row_format.pack(hidden_TH, self._head) for hidden_TH in computed])
        made = dict(zip(missing, blobs, strict=True))
        if self._cache:
            for i, blob in made.items():
                self._cache.put(i, blob)
        return made

    def rows_of(self, examples: Sequence[Example]) -> TeacherRows:
        """Computes the rows of examples that are never cached, such as the student's rollouts.

        More of them will follow, so the live teacher stays loaded until `release`.
        """
        self._is_kept = True
        with self.phases.phase("teacher"):
            return TeacherRows(self._head, hidden_NH=torch.cat(self._compute(examples)))

    def _compute(self, examples: Sequence[Example]) -> list[Tensor]:
        if self._live is None:
            self._live = self._load()
        self.num_computed += len(examples)
        device = self._head.weight_VH.device  # the teacher itself may be elsewhere
        return [to_device(hidden_TH, device) for hidden_TH in self._live.hidden(examples)]

    def fill(self, ranks: Ranks, batch_tokens: int, on_batch: Callable[[int, int], None]) -> None:
        """Computes and stores the missing rows, a share per rank; then releases the live teacher.

        `on_batch` is called with the number of rows that are done, and the size of this rank's
        share.
        """
        assert self._cache is not None
        missing = self._cache.refresh()
        ranks.wait()  # no rank may store rows before all ranks have called refresh
        lengths = [example.num_tokens for example in self._examples]
        mine = sorted(ranks.share(missing, lengths), key=lengths.__getitem__)
        num_done = 0
        for indices in cut_batches(mine, lengths, batch_tokens):
            self.rows(indices)
            num_done += len(indices)
            on_batch(num_done, len(mine))
        ranks.wait()
        self._cache.refresh()
        self.release()

    def keep(
        self, states_of: Callable[[int], Tensor | None], on_batch: Callable[[int, int], None]
    ) -> None:
        """Stores missing rows from hidden states that were computed before.

        `states_of` returns the hidden states [T, H] of an example, or None. `on_batch` is called
        with the numbers of rows that are done and wanted, before each batch.
        """
        if self._cache is None or self._format is None:
            return
        missing = self._cache.refresh()
        lengths = [example.num_targets for example in self._examples]
        num_done = 0
        for indices in cut_batches(missing, lengths, KEPT_AT_ONCE):
            on_batch(num_done, len(missing))
            num_done += len(indices)
            states = {i: states_of(i) for i in indices}
            found = {i: hidden_TH for i, hidden_TH in states.items() if hidden_TH is not None}
            if not found:
                continue
            blobs = self._format.pack_all(list(found.values()), self._head)
            for i, blob in zip(found, blobs, strict=True):
                self._cache.put(i, blob)
            self.num_kept += len(found)

    def release(self) -> None:
        """Frees the live teacher until it is needed again."""
        self._live, self._is_kept = None, False
        gc.collect()  # modules form reference cycles, and their memory is needed now

    def close(self) -> None:
        if self._cache:
            self._cache.close()
        self._cache = None
        self._live = None


def cached_teacher(
    load: Callable[[], Teacher],
    head: Head,
    *,
    folder: Path,
    budget_bytes: int,
    identity: str,
    examples: Sequence[Example],
    keeps: Keeps = "hidden",
    may_keep_top: bool = False,
    hidden_dtype: torch.dtype = torch.float32,
    masks: Sequence[Tensor] | None = None,
) -> CachedTeacher:
    """Returns a teacher for these rows, cached under `folder` in the most exact format that fits.

    The formats, in order: `hidden_dtype` (the body's own dtype; float32 on a CPU), bfloat16, and
    with `may_keep_top` the most likely tokens. If none fits the budget, the teacher runs at every
    step. `identity` names the teacher: hashes of its weights and tokenizer.

    `keeps="expected"` needs a student with the teacher's frozen head, and forward KL at temperature
    1 throughout. Top-k rows serve all divergences except those of ranks and of raw logits.
    """
    for row_format, note in _formats(keeps, head, hidden_dtype, may_keep_top=may_keep_top):
        sizes = [row_format.blob_bytes(example.num_targets) for example in examples]
        if cache_bytes(sizes) <= budget_bytes:
            family, names = (
                _family(identity, row_format, head),
                [_name(example) for example in examples],
            )
            cache = open_cache(folder, family, names, sizes, budget_bytes=budget_bytes)
            if cache is None:
                note = "the disk has no room to cache the teacher's rows: the teacher runs at every step, which is slower"
            return CachedTeacher(load, head, examples, cache, row_format, note, masks)
    note = "the teacher's rows do not fit in the cache's budget: the teacher runs at every step, which is slower"
    return CachedTeacher(load, head, examples, None, None, note, masks)


def _formats(
    keeps: Keeps, head: Head, hidden_dtype: torch.dtype, *, may_keep_top: bool
) -> Iterator[tuple[RowFormat, str | None]]:
    """Yields the formats, the most exact first, each with a note on what it loses."""
    hidden_size = head.weight_VH.shape[1]
    # expected rows are sums over the rows of the head
    dtype = hidden_dtype if keeps == "hidden" else head.weight_VH.dtype
    if keeps != "top":
        yield RowFormat(keeps, hidden_size, dtype), None
        if dtype != torch.bfloat16:
            note = "the teacher's rows are cached in bfloat16, because they would not fit in the cache's budget in float32"
            yield RowFormat(keeps, hidden_size, torch.bfloat16), note
    if (may_keep_top or keeps == "top") and head.num_tokens > TOP_K:
        note = (
            f"only the {TOP_K} most likely tokens of the teacher's rows are cached, because more would not fit in the "
            "cache's budget: the other tokens count as one, and KL is a lower bound"
        )
        yield RowFormat("top", TOP_K, torch.float32), note


def _family(identity: str, row_format: RowFormat, head: Head) -> str:
    """Returns a hash of everything but the rows that determines the cached bytes.

    It includes threads and device, because they change the order of sums.
    """
    settings = {
        "identity": identity,
        "keeps": row_format.keeps,
        "width": row_format.width,
        "dtype": str(row_format.dtype),
        "head": [*head.weight_VH.shape, str(head.weight_VH.dtype)],
        "device": head.weight_VH.device.type,
        "num_threads": torch.get_num_threads(),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def _name(example: Example) -> bytes:
    """Returns a hash of everything that the teacher rows of an example depend on."""
    digest = hashlib.blake2b(digest_size=NAME_BYTES)
    for ids in (example.source_ids, example.token_ids, example.target_positions):
        digest.update(array("q", [len(ids), *ids]).tobytes())
    return digest.digest()


def on_cpu(blobs: Sequence[Tensor]) -> list[Tensor]:
    """Returns the blobs of rows on the CPU. The host waits for a GPU once."""
    if blobs[0].device.type == "cpu":
        return list(blobs)
    together = torch.cat(list(blobs)).cpu()
    # each row gets its own memory, whose start is aligned for all dtypes
    return [blob.clone() for blob in torch.split(together, [len(blob) for blob in blobs])]
