"""Rows made ready for a training: read, encoded, held out, and completed by the teacher where they ask for it."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from worker.distill.answers import AnswerFile, Asking, ask
from worker.distill.data import Encoder, Example, Row, read_rows, split_rows, without_questions_of
from worker.distill.errors import InvalidTrainingFile
from worker.distill.pace import Throttle
from worker.distill.progress import MessageLine, ProgressLine, Sink, StageLine
from worker.distill.sampler import Generation, Sampler
from worker.distill.spec import RunSpec
from worker.distill.students import context_tokens, read_config

LOADED_PERCENT = 2.0  # of the run that is done before the teacher answers, or the training begins
ANSWERED_PERCENT = 30.0


@dataclass(frozen=True)
class Rows:
    """Training and held-out rows, encoded, in the same order as the lines they came from."""

    train: list[Example]
    valid: list[Example]
    valid_rows: list[Row]
    answers: AnswerFile
    answer_keys: tuple[str, ...] = ()

    @property
    def num_answered(self) -> int:
        """Rows that the teacher completed."""
        return len(self.answer_keys)


@dataclass(frozen=True)
class Preparation:
    """What rows are prepared with. `sampler` gives the teacher's, and is only called if something is to be answered.

    `check_stop` raises if the run is to stop; the answers so far are on file then.
    """

    spec: RunSpec
    tokenizer: PreTrainedTokenizerBase
    answers: AnswerFile
    sampler: Callable[[], Sampler]
    sink: Sink
    check_stop: Callable[[], None]

    def rows(self) -> Rows:
        """Raises InvalidTrainingFile, TeacherGenerationFailed."""
        train_rows, valid_rows = self._split()
        encoder = Encoder(self.tokenizer, max_tokens=self._max_tokens())
        mode = self.spec.distillation.data.completions
        examples = [encoder.encode(_as_asked(row, mode)) for row in (*train_rows, *valid_rows)]
        if self.spec.resume_dir is not None and (self.spec.resume_dir / "answers.jsonl").exists():
            self.answers.merge(self.spec.resume_dir / "answers.jsonl")
        examples, keys = self._answered(examples)
        num_train = len(train_rows)
        return Rows(examples[:num_train], examples[num_train:], valid_rows, self.answers, keys)

    def _split(self) -> tuple[list[Row], list[Row]]:
        rows = read_rows(self.spec.training_path)
        if self.spec.validation_path is None:
            return split_rows(rows)
        valid_rows = read_rows(self.spec.validation_path)
        kept = without_questions_of(rows, valid_rows)
        if not kept:
            raise InvalidTrainingFile("every training row asks what a validation row asks; keep them apart")
        if len(kept) < len(rows):
            self._warn(f"{len(rows) - len(kept)} training rows ask what a validation row asks: left out")
        return kept, valid_rows

    def _max_tokens(self) -> int:
        contexts = [context_tokens(read_config(d)) for d in (self.spec.teacher_dir, self.spec.start_dir)]
        return min(self.spec.distillation.hyperparameters.max_sequence_tokens, *contexts)

    def _answered(self, examples: list[Example]) -> tuple[list[Example], tuple[str, ...]]:
        """Has the teacher complete the rows that have no completion."""
        waiting = [i for i, example in enumerate(examples) if not example.spans]
        if not waiting:
            return examples, ()
        data = self.spec.distillation.data
        how = Asking(data.max_new_tokens, self._max_tokens(), data.temperature, data.top_p, self.spec.seed)
        self.sink(StageLine(name="generating_teacher_data"))
        prompts = [examples[i].token_ids for i in waiting]
        made = ask(prompts, how, self.answers, self.sampler, _Labelling(self.sink, self.check_stop))
        self._warn_of_cut(made)
        answered = list(examples)
        for i, answer in zip(waiting, made, strict=True):
            if not answer.tokens:
                raise InvalidTrainingFile(
                    f"the teacher answers line {examples[i].line} with nothing; leave it out"
                )
            answered[i] = examples[i].answered(answer.tokens)
        return answered, tuple(how.key(prompt) for prompt in prompts)

    def _warn_of_cut(self, made: list[Generation]) -> None:
        num_cut = sum(not answer.is_finished for answer in made)
        if num_cut:
            self._warn(
                f"{num_cut} of {len(made)} answers did not end within {self.spec.distillation.data.max_new_tokens} tokens; "
                "students learn to stop from answers that end, so raise data.max_new_tokens if they are many",
                num_cut=num_cut,
            )

    def _warn(self, message: str, **data: object) -> None:
        self.sink(MessageLine(level="warn", message=message, data=data))


class _Labelling:
    """Tells how far the teacher's answers are."""

    def __init__(self, sink: Sink, check_stop: Callable[[], None]) -> None:
        self.sink = sink
        self.check_stop = check_stop
        self.throttle = Throttle()
        self.begun = time.monotonic()
        self.num_before: int | None = None

    def __call__(self, num_done: int, num_wanted: int, num_tokens: int) -> None:
        self.check_stop()
        if self.num_before is None:
            self.num_before = num_done
        if not self.throttle.is_due():
            return
        seconds, num_made = time.monotonic() - self.begun, num_done - self.num_before
        share = num_done / num_wanted
        self.sink(
            ProgressLine(
                percent=round(LOADED_PERCENT + (ANSWERED_PERCENT - LOADED_PERCENT) * share, 1),
                tokens_per_second=round(num_tokens / max(seconds, 1e-6), 1),
                seconds_remaining=round(seconds / num_made * (num_wanted - num_done), 1)
                if num_made
                else None,
                rows_done=num_done,
                rows_total=num_wanted,
            )
        )


def _as_asked(row: Row, mode: str | None) -> Row:
    """The row with its completion, or the question alone if the teacher is to answer it."""
    if mode == "teacher":
        if row.text is not None:
            raise InvalidTrainingFile(
                f"line {row.line} is plain text, which asks nothing the teacher could answer; use prompt or messages"
            )
        return row.question
    if mode == "dataset" and not row.is_answered:
        raise InvalidTrainingFile(f'line {row.line} has no completion, and data.completions is "dataset"')
    return row
