"""Builds the replies to one request from its sampled tokens, for all engines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

from app.contracts.generation import Delta, Done, GenerateRequest, Reply, TokenLogprob
from worker.serve.decoding.sampling import SampledToken
from worker.serve.text.best_of import BestOf
from worker.serve.text.detokenizer import TextChunk, TextStream, TokenText
from worker.serve.text.tools.parsed import Parsed
from worker.serve.text.tools.parser import ToolParser

FinishReason = Literal["stop", "length"]


class Taken(NamedTuple):
    """Result of adding one token to an answer.

    `is_choice_over` is true if its choice has ended, possibly by a stop string. `is_over` is true
    if all choices have ended.
    """

    replies: list[Reply]
    is_choice_over: bool
    is_over: bool


@dataclass
class Answer:
    """Answer to one request in progress.

    `echoes` holds the text of the prompt for each choice that has not sent it yet, and `scores` the
    prompt's tokens with their log-probabilities. They are equal for all choices. `num_cached` of
    the prompt's tokens were in the prefix cache. `parsers` find the tool calls of each choice; there
    are none if the request has no tools.
    """

    request: GenerateRequest
    num_prompt_tokens: int
    text: TokenText
    streams: list[TextStream]
    echoes: dict[int, str]
    parsers: list[ToolParser]
    best_of: BestOf | None
    num_open: int
    num_completion_tokens: int = field(default=0, init=False)
    num_cached: int = field(default=0, init=False)
    scores: dict[int, Sequence[SampledToken]] = field(default_factory=dict, init=False)
    _prompt_entries: tuple[TokenLogprob, ...] | None = field(default=None, init=False)

    def take(self, choice: int, pick: SampledToken, reason: FinishReason | None) -> Taken:
        """Adds the next token of a choice and returns the replies that are due.

        `reason` is set if the token is the last one of its choice. With "stop", the token is an end
        token, whose text is left out.
        """
        if not self.request.sampling.max_tokens:
            return self._end_without_tokens(choice)
        self.num_completion_tokens += 1
        if self.best_of is not None and pick.logprob is not None:
            self.best_of.record(choice, pick.logprob)
        stream = self.streams[choice]
        piece = stream.end() if reason == "stop" else stream.push(pick, is_last=reason == "length")
        if piece.is_stopped:
            reason = "stop"
        parsed = Parsed(piece.text)
        if self.parsers:
            parser = self.parsers[choice]
            parsed = parser.feed(piece.text)
            if parser.is_over:
                reason = "stop"
            if reason is not None:
                parsed = parsed.then(parser.end())
        if not (reason or parsed.text or parsed.calls or piece.picks):
            return Taken([], is_choice_over=False, is_over=False)
        ending = pick if reason == "stop" else None
        delta = self._delta(choice, piece, parsed, reason, ending=ending)
        if self.best_of is not None:
            self.best_of.hold(delta)
        self.num_open -= reason is not None
        replies: list[Reply] = [] if self.best_of is not None else [delta]
        if not self.num_open:
            replies += self._last()
        return Taken(replies, is_choice_over=reason is not None, is_over=not self.num_open)

    def _end_without_tokens(self, choice: int) -> Taken:
        """Ends a choice that consists of the prompt only."""
        self.num_open -= 1
        delta = self._delta(choice, TextChunk(), Parsed(""), "length")
        replies: list[Reply] = [delta, *([] if self.num_open else self._last())]
        return Taken(replies, is_choice_over=True, is_over=not self.num_open)

    def _last(self) -> list[Reply]:
        done = Done(
            id=self.request.id,
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self.num_completion_tokens,
            cached_tokens=self.num_cached,
        )
        best = [] if self.best_of is None else self.best_of.best(self.request.n)
        return [*best, done]

    def _delta(
        self,
        choice: int,
        piece: TextChunk,
        parsed: Parsed,
        reason: FinishReason | None,
        ending: SampledToken | None = None,
    ) -> Delta:
        """Returns the delta with a piece of text. `ending` is the end token of the choice."""
        logprobs = None
        if self.request.sampling.logprobs is not None:
            entries = [self.text.logprob_of(pick) for pick in piece.picks]
            # With scores, each token has an entry: lm-evaluation-harness counts them.
            if self.request.sampling.scores_prompt and ending is not None and not piece.is_stopped:
                entries.append(self.text.logprob_of(ending))
            logprobs = self._take_prompt_entries(choice) + tuple(
                entry for entry in entries if entry
            )
        has_calls = bool(self.parsers) and self.parsers[choice].num_calls > 0
        return Delta(
            id=self.request.id,
            choice=choice,
            text=self.echoes.pop(choice, "") + parsed.text,
            tokens=tuple(pick.token for pick in piece.picks if pick.token is not None),
            logprobs=logprobs,
            tool_calls=parsed.calls,
            finish_reason="tool_calls" if reason == "stop" and has_calls else reason,
        )

    def _take_prompt_entries(self, choice: int) -> tuple[TokenLogprob, ...]:
        """Returns the log-probabilities of the prompt's tokens, if the choice has not sent them.

        The choices share them, because the conversion takes long for a long prompt.
        """
        scores = self.scores.pop(choice, None)
        if scores is None:
            return ()
        if self._prompt_entries is None:
            entries = (self.text.entry_of(pick) for pick in scores)
            self._prompt_entries = tuple(entry for entry in entries if entry)
        return self._prompt_entries


def begin_answer(
    request: GenerateRequest, prompt: tuple[int, ...], text: TokenText, *, is_continued: bool
) -> Answer:
    """Returns an empty answer to a request.

    `is_continued` is true if the answer continues the prompt, and false if an encoder reads the
    prompt.
    """
    sampling, num_sequences = request.sampling, request.num_sequences
    parser_of = _tool_parsers(request, text)
    if parser_of is not None and text.tool_format is not None:
        text = text.showing(text.tool_format.all_marks)
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
        parsers=[] if parser_of is None else [parser_of() for _ in range(num_sequences)],
        best_of=BestOf(num_sequences) if num_sequences > request.n else None,
        num_open=num_sequences,
    )


def _tool_parsers(request: GenerateRequest, text: TokenText) -> Callable[[], ToolParser] | None:
    """Returns a function that makes a parser for one choice, or None if no tool may be called."""
    tool_use = request.tool_use
    if tool_use is None or tool_use.choice == "none" or text.tool_format is None:
        return None
    names = frozenset(tool.name for tool in tool_use.tools)
    return partial(
        ToolParser,
        text.tool_format,
        names,
        is_parallel=tool_use.is_parallel,
        has_calls_only=tool_use.choice == "required" and request.sampling.grammar is not None,
    )


def num_logprobs_of(request: GenerateRequest) -> int | None:
    """Returns how many alternatives per token an engine must report with log-probabilities.

    0 means the chosen token only, which `best_of` needs for its ranking. None means no
    log-probabilities.
    """
    asked = request.sampling.logprobs
    return 0 if asked is None and request.num_sequences > request.n else asked


def seed_of(request: GenerateRequest, choice: int) -> int | None:
    """Returns the seed of a choice, or None if the request has no seed."""
    return None if request.sampling.seed is None else request.sampling.seed + choice
