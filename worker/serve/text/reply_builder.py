"""The answer to one request as it grows: whatever engine picks its tokens, replies are made here."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

from app.contracts.messages import Delta, Done, GenerateRequest, Reply
from worker.serve.decoding.sampling import SampledToken
from worker.serve.text.best_of import BestOf
from worker.serve.text.detokenizer import TextChunk, TextStream, TokenText

FinishReason = Literal["stop", "length"]


class Taken(NamedTuple):
    """What a token led to. `is_choice_over`: its choice has ended, maybe by a stop string; `is_over`: all have."""

    replies: list[Reply]
    is_choice_over: bool
    is_over: bool


@dataclass
class Answer:
    """A request under way. `echoes` holds the prompt's text for each choice that has not said it yet."""

    request: GenerateRequest
    num_prompt_tokens: int
    text: TokenText
    streams: list[TextStream]
    echoes: dict[int, str]
    best_of: BestOf | None
    num_open: int
    num_completion_tokens: int = field(default=0, init=False)

    def take(self, choice: int, pick: SampledToken, reason: FinishReason | None) -> Taken:
        """The next token of a choice, with why it is its last; one that ends by "stop" is an end token, and no text."""
        self.num_completion_tokens += 1
        if self.best_of is not None and pick.logprob is not None:
            self.best_of.record(choice, pick.logprob)
        stream = self.streams[choice]
        piece = stream.end() if reason == "stop" else stream.push(pick, is_last=reason == "length")
        if piece.is_stopped:
            reason = "stop"
        if not (reason or piece.text or piece.picks):
            return Taken([], is_choice_over=False, is_over=False)
        delta = self._delta(choice, piece, reason)
        if self.best_of is not None:
            self.best_of.hold(delta)
        self.num_open -= reason is not None
        replies: list[Reply] = [] if self.best_of is not None else [delta]
        if not self.num_open:
            replies += self._last()
        return Taken(replies, is_choice_over=reason is not None, is_over=not self.num_open)

    def _last(self) -> list[Reply]:
        done = Done(
            id=self.request.id,
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self.num_completion_tokens,
        )
        best = [] if self.best_of is None else self.best_of.best(self.request.n)
        return [*best, done]

    def _delta(self, choice: int, piece: TextChunk, reason: FinishReason | None) -> Delta:
        logprobs = None
        if self.request.sampling.logprobs is not None:
            logprobs = tuple(found for pick in piece.picks if (found := self.text.logprob_of(pick)))
        return Delta(
            id=self.request.id,
            choice=choice,
            text=self.echoes.pop(choice, "") + piece.text,
            tokens=tuple(pick.token for pick in piece.picks if pick.token is not None),
            logprobs=logprobs,
            finish_reason=reason,
        )


def begin_answer(
    request: GenerateRequest, prompt: tuple[int, ...], text: TokenText, *, is_continued: bool
) -> Answer:
    """An answer with nothing in it; `is_continued` unless an encoder reads the prompt."""
    sampling, num_sequences = request.sampling, request.num_sequences
    stream_of: Callable[[], TextStream] = partial(
        TextStream,
        text,
        prompt=prompt if is_continued else (),
        stop=sampling.stop,
        min_tokens=sampling.min_tokens,
    )
    echoes: dict[int, str] = {}
    if sampling.echo:
        shown = request.text if request.text is not None else text.decode(prompt)
        echoes = dict.fromkeys(range(num_sequences), shown)
    return Answer(
        request,
        len(prompt),
        text,
        streams=[stream_of() for _ in range(num_sequences)],
        echoes=echoes,
        best_of=BestOf(num_sequences) if num_sequences > request.n else None,
        num_open=num_sequences,
    )


def num_logprobs_of(request: GenerateRequest) -> int | None:
    """Alternatives an engine must tell of each token: best_of ranks by the log-probabilities of the chosen ones."""
    asked = request.sampling.logprobs
    return 0 if asked is None and request.num_sequences > request.n else asked


def seed_of(request: GenerateRequest, choice: int) -> int | None:
    """What the choice samples with, if the request has a seed."""
    return None if request.sampling.seed is None else request.sampling.seed + choice
