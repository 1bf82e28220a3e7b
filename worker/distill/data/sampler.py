"""How the trainer asks for text; `worker/train.py` implements it over the serving engine."""

from collections.abc import Callable, Sequence
from typing import Protocol

from pydantic import BaseModel, ConfigDict


class Generation(BaseModel):
    """Tokens one prompt was continued with; `is_finished` when the end token was reached (and is included)."""

    model_config = ConfigDict(frozen=True)
    tokens: tuple[int, ...]
    is_finished: bool


class Sampler(Protocol):
    """Continues prompts with one model, many at a time."""

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
    ) -> list[Generation]:
        """One generation a prompt, in the prompts' order.

        Prompt i samples with seeds[i] if given, else with seed + i, so that a result does not depend on its neighbours.
        With `ignore_end` an end token is a token like others: every generation has max_new_tokens, as timing wants.
        `on_answer(i, generation)` is called as soon as prompt i ends, `on_progress(num_done, num_tokens)` every now and
        then. What they raise ends the call.
        """
        ...
