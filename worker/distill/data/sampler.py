"""Interface through which training generates text.

`worker/train.py` implements it with the serving engine.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from pydantic import BaseModel, ConfigDict
from torch import Tensor


class Generation(BaseModel):
    """Tokens generated for one prompt.

    If `is_finished`, the last token is the end token; otherwise the token limit was reached.
    """

    model_config = ConfigDict(frozen=True)
    tokens: tuple[int, ...]
    is_finished: bool


class Sampler(Protocol):
    """Generates continuations of many prompts at a time with one model."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        ignore_end: bool = False,
        on_answer: Callable[[int, Generation], None] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        on_states: Callable[[int, Tensor], None] | None = None,
    ) -> list[Generation]:
        """Returns one generation per prompt, in the order of the prompts.

        Prompt i is sampled with the seed `seeds[i]` if `seeds` is given, and with `seed + i`
        otherwise. The result for a prompt therefore does not depend on the other prompts.

        With `ignore_end` the end token does not stop a generation. Each generation then has
        exactly `max_new_tokens` tokens, which benchmarks need.

        `on_answer(i, generation)` is called as soon as prompt i ends.
        `on_progress(num_done, num_tokens)` is called from time to time. `on_states(i, states_TH)` is
        called before `on_answer` with the inputs of the LM head from which the T tokens of prompt i
        were chosen; only for decoder-only models on a CPU. An exception that one of them raises ends
        the call and is passed on.
        """
        ...
