"""best_of: all choices of a request are held back until it is known which are best."""

from statistics import fmean

from app.contracts.messages import Delta


class BestOf:
    """The choices of one request under way, and the raw log-probability of each of their tokens."""

    def __init__(self, num_choices: int) -> None:
        self._deltas: list[list[Delta]] = [[] for _ in range(num_choices)]
        self._logprobs: list[list[float]] = [[] for _ in range(num_choices)]

    def record(self, choice: int, logprob: float) -> None:
        """Takes note of one more token, an end token included."""
        self._logprobs[choice].append(logprob)

    def hold(self, delta: Delta) -> None:
        self._deltas[delta.choice].append(delta)

    def best(self, n: int) -> list[Delta]:
        """One delta each of the n choices with the highest mean log-probability, numbered from the best on."""
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
