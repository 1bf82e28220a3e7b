"""Rows made ready for a training: read, encoded, held out, and completed by the teacher where they ask for it."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from app.contracts.distillation import Distillation
from worker.distill.data.answer_cache import AnswerFile, AnswerSampling, OnProgress, ask
from worker.distill.data.answer_filters import is_rejected
from worker.distill.data.rows import Encoder, Example, Row, read_rows
from worker.distill.data.sampler import Generation, Sampler
from worker.distill.data.split import Split, count_sharing, hold_out, keep_apart
from worker.errors import InvalidTrainingFile, UnsupportedModel
from worker.models.architectures import context_tokens, shape_of
from worker.protocol.run_lines import MessageLine, ProgressLine, Sink, StageLine, Throttle
from worker.protocol.run_spec import RunSpec

LOADED_PERCENT = 2.0  # of the run that is done before the teacher answers, or the training begins
ANSWERED_PERCENT = 30.0
UNCUT_TOKENS = 2**30


@dataclass(frozen=True)
class Rows:
    """Training and held-out rows as the student reads them, in the order of the lines they came from.

    `teacher` holds train's, then valid's, as the teacher reads them: where both read alike, the same examples.
    """

    train: list[Example]
    valid: list[Example]
    teacher: list[Example]
    valid_rows: list[Row]
    answers: AnswerFile
    answer_keys: tuple[str, ...] = ()
    max_tokens: int = 512  # that a row may have in either view

    def inputs_sha256(self, block: Distillation, seed: int) -> str:
        """Returns a hash of everything that the training depends on, which test rows do not."""
        spec = block.model_dump(mode="json", exclude={"evaluation": {"test_file"}})
        parts = [spec, seed]
        parts += [[row.token_ids, row.spans] for row in (*self.train, *self.valid)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    shared: dict[str, int] = field(
        default_factory=dict
    )  # for the result: rows that share a question

    @property
    def num_answered(self) -> int:
        """Rows that the teacher completed."""
        return len(self.answer_keys)


@dataclass(frozen=True)
class Reader:
    """A model as far as rows are concerned: what it is and how it reads text."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase

    def encoder(self, *, max_tokens: int, is_last_only: bool) -> Encoder:
        shape = shape_of(self.config)
        return Encoder(
            self.tokenizer,
            max_tokens=max_tokens,
            shape=shape,
            start_id=start_id_of(self.config) if shape == "seq2seq" else None,
            is_last_only=is_last_only,
        )


def start_id_of(config: PretrainedConfig) -> int:
    """The token an encoder-decoder's answer begins behind. Raises UnsupportedModel if the model names none."""
    for name in ("decoder_start_token_id", "bos_token_id"):
        found = getattr(config, name, None)
        if found is not None:
            return int(found)
    raise UnsupportedModel(
        "the encoder-decoder's config names no decoder_start_token_id; add it and import it anew"
    )


@dataclass(frozen=True)
class Preparation:
    """What rows are prepared with. `sampler` gives the teacher's, and is only called if something is to be answered.

    `teacher` and `student` may read alike or not, with one tokenizer (`has_one_tokenizer`) or two. `check_stop` raises
    if the run is to stop; the answers so far are on file then.
    """

    spec: RunSpec
    teacher: Reader
    student: Reader
    has_one_tokenizer: bool
    answers: AnswerFile
    sampler: Callable[[], Sampler]
    sink: Sink
    check_stop: Callable[[], None]

    def rows(self) -> Rows:
        """Returns the training and the held-out rows; test rows are only checked.

        Raises:
            InvalidTrainingFile: A row cannot be used.
            TeacherGenerationFailed: The teacher did not answer.
        """
        split = self._split()
        shared = {
            "num_train_rows_left_out": split.num_left_out,
            "num_shared_validation_rows": split.num_shared,
        }
        if self.spec.test_path is not None:
            shared["num_shared_test_rows"] = self._check_test_rows(split)
        return replace(self._completed(split.train, split.valid), shared=shared)

    def test_rows(self, tell: Callable[[float], None]) -> Rows:
        """Returns the test rows as held-out rows of no training; `tell` takes the share that the teacher has answered.

        A row that the teacher answers with nothing is left out, because nothing can be judged on it.
        """
        assert self.spec.test_path is not None
        return self._completed([], read_rows(self.spec.test_path), tell)

    def _completed(
        self,
        train_rows: list[Row],
        valid_rows: list[Row],
        tell: Callable[[float], None] | None = None,
    ) -> Rows:
        """The rows in both views, with the teacher's answers; with `tell` they are those of a test."""
        rows = [_as_asked(row, self.spec.distillation) for row in (*train_rows, *valid_rows)]
        teachers = [self._teacher_encoder.encode(row) for row in rows]
        students = (
            teachers if self._reads_alike else [self._student_encoder.encode(row) for row in rows]
        )
        if self.spec.resume_dir is not None and (self.spec.resume_dir / "answers.jsonl").exists():
            self.answers.merge(self.spec.resume_dir / "answers.jsonl")
        answers, keys = self._answers(teachers, tell)
        num_train = len(train_rows)
        kept = self._kept(answers, num_train, len(rows))
        views = {i: self._answered(rows[i], teachers[i], students[i], answers.get(i)) for i in kept}
        return Rows(
            train=[views[i][1] for i in kept if i < num_train],
            valid=[views[i][1] for i in kept if i >= num_train],
            teacher=[views[i][0] for i in kept],
            valid_rows=[valid_rows[i - num_train] for i in kept if i >= num_train],
            answers=self.answers,
            answer_keys=keys,
            max_tokens=self._max_tokens,
        )

    @property
    def _reads_alike(self) -> bool:
        one, other = self.teacher, self.student
        shapes = {shape_of(one.config), shape_of(other.config)}
        if shapes == {"seq2seq"}:
            return self.has_one_tokenizer and start_id_of(one.config) == start_id_of(other.config)
        return self.has_one_tokenizer and "seq2seq" not in shapes

    @property
    def _is_last_only(self) -> bool:
        return "seq2seq" in (shape_of(self.teacher.config), shape_of(self.student.config))

    @cached_property
    def _teacher_encoder(self) -> Encoder:
        return self.teacher.encoder(max_tokens=self._max_tokens, is_last_only=self._is_last_only)

    @cached_property
    def _student_encoder(self) -> Encoder:
        return self.student.encoder(max_tokens=self._max_tokens, is_last_only=self._is_last_only)

    @cached_property
    def _long_encoder(self) -> Encoder:
        """The student's, for answers that are cut afterwards."""
        return self.student.encoder(max_tokens=UNCUT_TOKENS, is_last_only=self._is_last_only)

    def _split(self) -> Split:
        rows, version = read_rows(self.spec.training_path), self.spec.split_version
        if self.spec.validation_path is None:
            split = hold_out(rows, version)
        else:
            split = keep_apart(rows, read_rows(self.spec.validation_path), version)
        for message in split.warnings:
            self._warn(message, num_shared=split.num_shared, num_left_out=split.num_left_out)
        return split

    def _check_test_rows(self, split: Split) -> int:
        """Returns how many test rows share a question with rows that the training sees, and warns of them.

        Raises InvalidTrainingFile for rows that could not be judged, hours before they are.
        """
        assert self.spec.test_path is not None
        try:
            rows = read_rows(self.spec.test_path)
            for row in rows:
                asked = _as_asked(row, self.spec.distillation)
                self._demand_completion(self._teacher_encoder.encode(asked))
                if not self._reads_alike:
                    self._student_encoder.encode(asked)
        except InvalidTrainingFile as e:
            raise InvalidTrainingFile(f"evaluation.test_file: {e}") from e
        num_train, num_shared = (
            count_sharing(rows, others) for others in (split.train, [*split.train, *split.valid])
        )
        if num_shared:
            self._warn(
                f"{num_shared} of {len(rows)} test rows share a question with training or held-out rows ({num_train} with "
                "training rows): their figures are too optimistic",
                num_shared=num_shared,
                num_shared_with_training=num_train,
            )
        return num_shared

    def _demand_completion(self, example: Example) -> None:
        """Raises InvalidTrainingFile for a row that waits for an answer of a teacher that writes none."""
        if not example.spans and shape_of(self.teacher.config) == "masked":
            raise InvalidTrainingFile(
                f"line {example.line} has no completion, and {self.teacher.config.model_type} writes none: give "
                "completions, or another teacher"
            )

    @property
    def _max_tokens(self) -> int:
        contexts = [context_tokens(reader.config) for reader in (self.teacher, self.student)]
        return min(self.spec.distillation.hyperparameters.max_sequence_tokens, *contexts)

    def _answers(
        self, examples: list[Example], tell: Callable[[float], None] | None
    ) -> tuple[dict[int, Generation], tuple[str, ...]]:
        """Returns what the teacher answers to the rows that have no completion, by row."""
        waiting = [i for i, example in enumerate(examples) if not example.spans]
        if not waiting:
            return {}, ()
        self._demand_completion(examples[waiting[0]])
        data = self.spec.distillation.data
        how = AnswerSampling(
            data.max_new_tokens,
            self._max_tokens,
            data.temperature,
            data.top_p,
            self.spec.seed,
            is_prompt_apart=shape_of(self.teacher.config) == "seq2seq",
        )
        prompts = [examples[i].prompt_ids for i in waiting]
        on_progress: OnProgress
        if tell is None:
            self.sink(StageLine(name="generating_teacher_data"))
            on_progress = _Labelling(self.sink, self.check_stop)
        else:
            on_progress = _sharing(tell)
        made = ask(prompts, how, self.answers, self.sampler, on_progress)
        self._warn_of_cut(made)
        for i, answer in zip(waiting, made, strict=True):
            if not answer.tokens and tell is None:
                raise InvalidTrainingFile(
                    f"the teacher answers line {examples[i].line} with nothing; leave it out"
                )
        return dict(zip(waiting, made, strict=True)), tuple(how.key(prompt) for prompt in prompts)

    def _answered(
        self, row: Row, teacher: Example, student: Example, answer: Generation | None
    ) -> tuple[Example, Example]:
        """Both views of a row, with the same targets if they share a tokenizer."""
        if answer is None:
            return teacher, student
        if self.has_one_tokenizer:
            room = self._max_tokens - len(
                student.token_ids
            )  # the student's prompt may take more of its sequence
            tokens = answer.tokens[: max(1, room)]
            return teacher.answered(tokens), student.answered(tokens)
        text = str(self.teacher.tokenizer.decode(answer.tokens, skip_special_tokens=True))
        turn = {"role": "assistant", "content": text}
        whole = replace(
            row, messages=(*row.messages, turn), unlearned=frozenset(range(len(row.messages)))
        )
        student = self._long_encoder.encode(whole)
        room = self._max_tokens - len(student.token_ids) + len(student.completion_ids)
        if len(student.completion_ids) > room:  # the student may need more tokens for the same text
            return teacher.answered(answer.tokens), student.answered(
                student.completion_ids[: max(1, room)]
            )
        if not answer.is_finished and student.completion_ids[-1] == self._student_encoder.end_id:
            student = student.answered(student.completion_ids[:-1] or student.completion_ids)
        return teacher.answered(answer.tokens), student

    def _kept(self, answers: dict[int, Generation], num_train: int, num_rows: int) -> list[int]:
        """Returns the numbers of the rows whose answers pass the reject rules; an empty answer never does."""
        rules = self.spec.distillation.data.reject
        rejected = {i for i, answer in answers.items() if is_rejected(answer, rules)}
        if rejected:
            self._warn(
                f"{len(rejected)} of {len(answers)} answers rejected", num_rejected=len(rejected)
            )
        kept = [i for i in range(num_rows) if i not in rejected]
        if (num_train and not any(i < num_train for i in kept)) or not any(
            i >= num_train for i in kept
        ):
            names = "training or no held-out" if num_train else "test"
            raise InvalidTrainingFile(f"data.reject leaves no {names} rows; loosen its rules")
        return kept

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


def _sharing(tell: Callable[[float], None]) -> OnProgress:
    return lambda num_done, num_wanted, num_tokens: tell(num_done / num_wanted)


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


def _as_asked(row: Row, block: Distillation) -> Row:
    """The row with its completion, or the question alone if the teacher is to answer it."""
    mode, then = block.data.completions, block.objective.then
    writers = {mode, then and then.completions} - {None, "dataset"}
    if row.text is not None and writers:
        raise InvalidTrainingFile(
            f"line {row.line} is plain text, which asks nothing that could be answered (completions "
            f"{', '.join(sorted(map(str, writers)))}); use prompt or messages"
        )
    if mode == "teacher":
        return row.question
    if mode == "dataset" and not row.is_answered:
        raise InvalidTrainingFile(
            f'line {row.line} has no completion, and data.completions is "dataset"'
        )
    return row
