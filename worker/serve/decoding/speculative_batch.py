"""A shared-cursor batch that reads several tokens a row beyond its cursor and keeps as many as each row wants.

Rows that keep fewer than others would end before the common column. Attention does not care in which column a key lies,
as long as its position was right when it was written: so a row's newest columns move right, to end with the others', and
its oldest ones fill what they left. A few columns are copied and the row stays what every row of the batch is, one run of
columns from its start to the cursor. Families that read distances between columns have all of a row moved instead.
"""

# N rows, Q tokens a row, K logits a row, C columns, V vocabulary
from collections.abc import Sequence

import torch
from torch import Tensor

from worker.serve.decoding.cursor_batch import CursorBatch


class LookaheadBatch(CursorBatch):
    """Rows in step that look ahead together and are cut back one by one. A width must have room for what is cut back."""

    def make_room_for(self, num_tokens: int) -> None:
        """Before looking so many tokens ahead: what lies behind the cursor cannot move while that lasts."""
        while self.cursor + num_tokens > self.cache.window.width:
            self._make_room()

    @torch.no_grad()
    def look(self, tokens: Sequence[Sequence[int]], *, offset: int, num_logits: int = 1) -> Tensor:
        """Reads equally many tokens for every row, from `offset` columns behind the cursor on, which stays where it is.

        Gives the logits of the last token [N, V], or of the last K [N, K, V]; float32.
        """
        column = self.cursor + offset
        return self._forward(
            torch.tensor(tokens), 0, low=self.low, column=column, num_logits=num_logits
        )

    def keep(self, num_kept: Sequence[int]) -> None:
        """Moves the cursor over the longest run, and keeps of each row the first `num_kept` tokens behind the old one."""
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
        self.cache.take_columns(slice(first, self.cursor), source_NC.clamp(min=0).to(self.device))

    def _positions(self, columns_Q: Tensor, starts_N1: Tensor) -> Tensor:
        # tokens that lie beyond the model's last position are cut back, but they are looked up
        return (
            super()
            ._positions(columns_Q, starts_N1)
            .clamp(max=(self.family.context_tokens or 2**31) - 1)
        )
