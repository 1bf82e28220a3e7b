"""Shared-cursor batch that reads several tokens per row beyond the cursor, and keeps some of them.

Rows that keep fewer tokens than others would end before the common cursor. Attention does not
depend on the column of a key, only on the position with which it was written. The newest columns of
such a row therefore move right, so that they end at the cursor. Its oldest columns fill the gap.
Only a few columns are copied, and every row still occupies all columns from its start to the
cursor. Families that use distances between columns need all columns of the row moved instead.
"""

# N rows, Q tokens per row, K logits per row, C columns, V vocabulary
from collections.abc import Sequence

import torch
from torch import Tensor

from worker.host_copies import to_device
from worker.serve.decoding.cursor_batch import CursorBatch


class LookaheadBatch(CursorBatch):
    """Rows that read tokens beyond the cursor together, and keep a different number of them.

    `max_width` must have room for the tokens that are not kept.
    """

    def make_room_for(self, num_tokens: int) -> None:
        """Makes room for `num_tokens` columns after the cursor.

        Must be called before `forward`. Columns after the cursor are not moved with a row.
        """
        while self.cursor + num_tokens > self.cache.window.width:
            self._make_room()

    @torch.no_grad()
    def forward(
        self, tokens: Sequence[Sequence[int]], *, offset: int, num_logits: int = 1
    ) -> Tensor:
        """Reads the same number of tokens for every row, from `offset` columns after the cursor on.

        The cursor does not move. Returns the float32 logits of the last token [N, V], or of the
        last K tokens [N, K, V].
        """
        column = self.cursor + offset
        return self._forward(
            torch.tensor(tokens), 0, low=self.low, column=column, num_logits=num_logits
        )

    def keep(self, num_kept: Sequence[int]) -> None:
        """Advances the cursor by the largest of `num_kept`.

        Each row keeps the first `num_kept` tokens after the old cursor.
        """
        column, self.cursor = self.cursor, self.cursor + max(num_kept)
        gaps = [max(num_kept) - num for num in num_kept]
        if any(gaps):
            self._close(gaps, column)
            self.starts = [start + gap for start, gap in zip(self.starts, gaps, strict=True)]

    def _close(self, gaps: Sequence[int], column: int) -> None:
        gaps_N1, starts_N1 = torch.tensor(gaps)[:, None], torch.tensor(self.starts)[:, None]
        first = self.low if self.family.reads_column_order else column
        columns_C = torch.arange(first, self.cursor)
        source_NC = columns_C - gaps_N1
        if not self.family.reads_column_order:
            oldest_NC = starts_N1 + columns_C - (starts_N1 + gaps_N1).clamp(min=column)
            source_NC = torch.where(source_NC >= column, source_NC, oldest_NC)
        source_NC = to_device(source_NC.clamp(min=0), self.device)
        self.cache.take_columns(slice(first, self.cursor), source_NC)

    def _positions(self, columns_Q: Tensor, starts_N1: Tensor) -> Tensor:
        # Tokens beyond the model's last position are not kept, but their positions are looked up.
        return (
            super()
            ._positions(columns_Q, starts_N1)
            .clamp(max=(self.family.context_tokens or 2**31) - 1)
        )
