"""Continuous batching of token sequences, independent of text, requests and replies."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from worker.host_copies import to_device
from worker.serve.decoding.cache_status import CacheStatus
from worker.serve.decoding.cursor_batch import CursorBatch, Steps
from worker.serve.decoding.prompt_scores import PromptScores
from worker.serve.decoding.sampling import SampledToken, TokenSampler, pick_tokens
from worker.serve.decoding.scheduler import Scheduler

# Tokens of one prefill call, padding included. Bounds how long the running rows wait.
PREFILL_BUDGET = 1024


@dataclass(eq=False)
class Sequence:
    """One choice of one request.

    `tokens` grows with each step. An end token is its last token. If the model has an encoder, the
    encoder reads `prompt`. Tenants share the batch fairly.

    num_prompt_logprobs: Number of alternatives for each token of the prompt in `prompt_picks`. None
        leaves `prompt_picks` empty.
    num_cached: Number of prompt tokens that were in the prefix cache.
    """

    request_id: str
    prompt: tuple[int, ...]
    max_tokens: int
    end_ids: frozenset[int]
    sampler: TokenSampler
    choice: int = 0
    tenant: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    num_prompt_logprobs: int | None = None
    prompt_picks: list[SampledToken] = field(default_factory=list)
    num_cached: int = 0


class Decoder:
    """Continuous batching: a step prefills new sequences or advances all running sequences."""

    def __init__(
        self,
        model: nn.Module,
        *,
        max_running: int,
        max_context_tokens: int,
        prefill_budget: int = PREFILL_BUDGET,
        min_joining: int = 1,
        steps: Steps = "auto",
        batch: CursorBatch | None = None,
    ) -> None:
        """Creates a decoder without sequences.

        While sequences run, a prefill waits until `min_joining` new sequences, or all that wait,
        can join. A high value favours throughput over the time to the first token. On a CUDA device,
        the free memory replaces `prefill_budget`. `batch` replaces the default batch, with its
        `steps`.
        """
        self.max_running = max_running
        self._most_rows = max_running  # that the memory for the caches allows
        self.min_joining = min_joining
        self.batch = batch or CursorBatch(
            model,
            max_rows=max_running,
            max_width=max_context_tokens,
            max_source_width=max_context_tokens,
            steps=steps,
        )
        self.context = self.batch.family.context(max_context_tokens)
        self._waiting: Scheduler[Sequence] = Scheduler(
            prefill_budget=prefill_budget, num_to_read=self._num_to_read
        )
        self._rows: list[Sequence] = []  # _rows[i] is in row i of the batch
        # Sequences that are not in the batch yet, and those whose next tokens are being chosen.
        self._joining: list[Sequence] = []
        self._choosing: list[Sequence] = []
        self._has_prefilled = False
        self._num_prefix_queries = self._num_prefix_hits = 0

    @property
    def num_running(self) -> int:
        return len(self._rows)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def has_work(self) -> bool:
        return bool(self._rows or self.num_waiting)

    def cache_status(self) -> CacheStatus:
        """Returns the use of the caches. The tokens of a row fill the columns after its start."""
        batch = self.batch
        num_used = batch.num_rows * batch.cursor - sum(batch.starts)
        usage = num_used / (batch.max_rows * batch.max_width)
        return CacheStatus(usage, self._num_prefix_queries, self._num_prefix_hits)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache and the prefix cache."""
        return self.batch.cache_bytes

    def limit_cache(self, num_bytes: int) -> None:
        """Sets the bytes that the caches may take.

        Sequences whose rows would exceed the limit wait, but one sequence can always run. Rows that
        run may grow beyond the limit.
        """
        if row_bytes := self.batch.row_bytes:
            self._most_rows = max(1, (num_bytes - self.batch.reserved_bytes) // row_bytes)
            self.batch.limit_rows(self._most_rows)

    def free_cache(self) -> None:
        """Frees the caches if there are no sequences."""
        if not self._rows:
            self.batch.free()

    def recover(self) -> list[Sequence]:
        """Makes the decoder usable after a step that ran out of memory.

        Returns the sequences that cannot continue, which the caller must drop: those that were to
        join, or else the one with the fewest tokens. If the step failed while it moved the cache or
        chose tokens, it returns all sequences that it may have damaged.
        """
        for sequence in self._joining:
            self._waiting.finish(sequence)
        lost = self._joining + self._choosing
        self._joining, self._choosing = [], []
        if not self.batch.truncate(len(self._rows)):
            return [*lost, *self._rows]
        return lost or sorted(self._rows, key=lambda sequence: len(sequence.tokens))[:1]

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. Its prompt and `max_tokens` must fit the context."""
        assert sequence.prompt, "the caller refuses empty prompts"
        assert sequence.max_tokens <= self.context.room_for(len(sequence.prompt)), (
            "the caller checks the context"
        )
        self._waiting.add(sequence)

    def drop(self, is_unwanted: Callable[[Sequence], bool]) -> None:
        """Removes the waiting and running sequences for which the predicate is true.

        Their rows are free at once.
        """
        self._waiting.remove(is_unwanted)
        for row in reversed(range(len(self._rows))):
            if is_unwanted(self._rows[row]):
                self._leave(row)

    def step(self) -> Iterable[tuple[Sequence, SampledToken]]:
        """Runs one model call and returns each sequence with its next token.

        Sequences that have finished are no longer in the batch when it returns. A prefill is always
        followed by a decode step, so that new sequences cannot starve the running ones.
        """
        groups = self._admit() if self.num_waiting and self._may_join() else []
        self._has_prefilled = bool(groups)
        if groups:
            sequences, logits_NV = self._prefill(groups)
        elif self._rows:
            sequences = list(self._rows)
            logits_NV = self.batch.advance([sequence.tokens[-1] for sequence in sequences])
        else:
            return []
        self._choosing = sequences
        picks = pick_tokens(logits_NV, [sequence.sampler for sequence in sequences])
        first_row = len(self._rows) - len(sequences)
        for row, pick in reversed(list(enumerate(picks, first_row))):
            self._take(row, pick)
        self._choosing = []
        return list(zip(sequences, picks, strict=True))

    def _admit(self) -> list[list[Sequence]]:
        """Returns the sequences of the next prefill. The memory of a GPU decides how many."""
        num_tokens = self.batch.prefill_tokens(self.batch.cache.window.width)
        if num_tokens is not None:
            self._waiting.prefill_budget = num_tokens
        return self._waiting.admit(self._num_free_rows())

    def _num_free_rows(self) -> int:
        most_rows = min(self.max_running, self._most_rows)
        return max(0 if self._rows else 1, most_rows - len(self._rows))

    def _may_join(self) -> bool:
        if not self._rows:
            return True
        num_joining = min(self._num_free_rows(), self.num_waiting)
        return not self._has_prefilled and num_joining >= min(self.min_joining, self.num_waiting)

    def _num_to_read(self, sequence: Sequence) -> int:
        """Returns how many tokens of a prompt must be prefilled.

        Tokens in the prefix cache are read again if their log-probabilities are needed.
        """
        if sequence.num_prompt_logprobs is not None:
            return len(sequence.prompt)
        return self.batch.num_to_read(sequence.prompt)

    def _join(self, sequences: list[Sequence]) -> Tensor:
        """Prefills the prompts of sequences. Those that need scores must be the last ones."""
        plain = [s for s in sequences if s.num_prompt_logprobs is None]
        scored = sequences[len(plain) :]
        logits = []
        if plain:
            for sequence in plain:
                num_read = self.batch.num_to_read(sequence.prompt)
                sequence.num_cached = len(sequence.prompt) - num_read
                self._num_prefix_queries += len(sequence.prompt)
                self._num_prefix_hits += sequence.num_cached
            logits.append(self.batch.join([sequence.prompt for sequence in plain]))
        num_joined = max(1, len(scored)) if self.batch.family.can_pad_prompts else 1
        for begin in range(0, len(scored), num_joined):
            joined = scored[begin : begin + num_joined]
            scores = PromptScores([(s.prompt, s.num_prompt_logprobs or 0) for s in joined])
            logits.append(self.batch.join_scored([s.prompt for s in joined], scores.add))
            for sequence, picks in zip(joined, scores.picks, strict=True):
                sequence.prompt_picks = picks
        return torch.cat(logits)

    def _prefill(self, groups: list[list[Sequence]]) -> tuple[list[Sequence], Tensor]:
        groups = sorted(groups, key=lambda group: group[0].num_prompt_logprobs is not None)
        self._joining = [sequence for group in groups for sequence in group]
        first_row = self.batch.num_rows
        logits_KV = self._join([group[0] for group in groups])
        sequences, sources = [group[0] for group in groups], list(range(len(groups)))
        for index, group in enumerate(groups):
            for sequence in group[1:]:
                sequence.prompt_picks = group[0].prompt_picks
                sequence.num_cached = group[0].num_cached
                self.batch.fork(first_row + index)
                sequences.append(sequence)
                sources.append(index)
        logits_NV = logits_KV.index_select(0, to_device(torch.tensor(sources), logits_KV.device))
        self._rows += sequences
        self._joining = []
        return sequences, logits_NV

    def _take(self, row: int, pick: SampledToken) -> None:
        sequence = self._rows[row]
        if pick.token is None:
            self._leave(row, is_poisoned=True)
            return
        sequence.tokens.append(pick.token)
        self._waiting.charge_token(sequence)
        if pick.token in sequence.end_ids:
            sequence.finish_reason = "stop"
        elif len(sequence.tokens) >= sequence.max_tokens:
            sequence.finish_reason = "length"
        if sequence.finish_reason:
            self._leave(row)

    def _leave(self, row: int, *, is_poisoned: bool = False) -> None:
        self.batch.leave(row, is_poisoned=is_poisoned)
        self._waiting.finish(self._rows[row])
        last = self._rows.pop()
        if row < len(self._rows):
            self._rows[row] = last
