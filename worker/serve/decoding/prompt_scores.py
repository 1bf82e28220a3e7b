"""Log-probabilities of the tokens of prompts, computed from the logits of one chunk at a time."""

# K prompts, padded on the left to W columns, Q columns of one chunk, V vocabulary, T alternatives
from collections.abc import Sequence

import torch
from torch import Tensor

from worker.host_copies import to_device
from worker.serve.decoding.sampling import SampledToken

MIN_LOGPROB = -9999.0  # as in vLLM: JSON has no infinity


class PromptScores:
    """Log-probabilities of the tokens of some prompts, and of the best tokens in their places.

    `picks` has one entry per prompt token. The first token of a prompt has no log-probability. A
    token is None if the logits before it are not finite.
    """

    def __init__(self, prompts: Sequence[tuple[Sequence[int], int]]) -> None:
        """Takes the prompts, each with its number of alternatives per token."""
        self.picks = [[SampledToken(prompt[0])] for prompt, _ in prompts]
        self._prompts = [list(prompt) for prompt, _ in prompts]
        self._num_top = [num_top for _, num_top in prompts]
        self._width = max(map(len, self._prompts))
        rows = [[0] * (self._width - len(prompt)) + prompt for prompt in self._prompts]
        self._tokens_KW = torch.tensor(rows)

    def add(self, column: int, logits_KQV: Tensor) -> None:
        """Adds the float32 logits after the tokens at columns [column, column + Q).

        The logits after the last token are those of the answer, and are ignored. Chunks must be
        added in order.
        """
        num_columns = min(logits_KQV.shape[1], self._width - 1 - column)
        if num_columns <= 0:
            return
        logprobs_KQV = logits_KQV[:, :num_columns].log_softmax(dim=-1)
        next_KQ1 = self._tokens_KW[:, column + 1 : column + 1 + num_columns, None]
        value_KQ1 = logprobs_KQV.gather(2, to_device(next_KQ1, logprobs_KQV.device))
        num_top = min(max(self._num_top), logprobs_KQV.shape[2])
        best_KQT, best_tokens_KQT = logprobs_KQV.topk(num_top, dim=-1)
        # The value and the alternatives come from one array: a token that is the best has exactly
        # the value of the best alternative.
        logprobs = torch.cat((value_KQ1, best_KQT), dim=-1).clamp(min=MIN_LOGPROB).cpu().tolist()
        best_tokens = best_tokens_KQT.cpu().tolist()
        for row, prompt in enumerate(self._prompts):
            padding = self._width - len(prompt)
            for at in range(max(0, padding - column), num_columns):
                (value, *best), num_kept = logprobs[row][at], self._num_top[row]
                token = prompt[column + at + 1 - padding] if value == value else None  # not NaN
                top = zip(best_tokens[row][at][:num_kept], best[:num_kept], strict=True)
                self.picks[row].append(SampledToken(token, value, tuple(top)))
