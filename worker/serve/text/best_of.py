"""Ranking for `best_of`: holds back the choices of a request until all have ended."""

from statistics import fmean

from app.contracts.generation import Delta


class BestOf:
    """Choices of one request, with the raw log-probability of each of their tokens."""

    def __init__(self, num_choices: int) -> None:
        self._deltas: list[list[Delta]] = [[] for _ in range(num_choices)]
        self._logprobs: list[list[float]] = [[] for _ in range(num_choices)]

    def record(self, choice: int, logprob: float) -> None:
        """Records the log-probability of the next token of a choice, including an end token."""
        self._logprobs[choice].append(logprob)

    def hold(self, delta: Delta) -> None:
        """Holds back a delta until `best` is called."""
        self._deltas[delta.choice].append(delta)

    def best(self, n: int) -> list[Delta]:
        """Returns the `n` choices with the highest mean log-probability, best first.

        Each choice is one delta with the complete answer, numbered by its rank from 0.
        """
        ranked = sorted(range(len(self._deltas)), key=lambda choice: -fmean(self._logprobs[choice]))
        return [self._whole(choice, number) for number, choice in enumerate(ranked[:n])]

    def _whole(self, choice: int, number: int) -> Delta:
        parts = self._deltas[choice]
        logprobs = None
        if parts[-1].logprobs is not None:
            logprobs = tuple(entry for part in parts for entry in part.logprobs or ())
        return Delta(
            id=parts[-1].id,
            choice=number,
            text="".join(part.text for part in parts),
            tokens=tuple(token for part in parts for token in part.tokens),
            logprobs=logprobs,
            finish_reason=parts[-1].finish_reason,
        )
