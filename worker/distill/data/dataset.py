"""Prepares rows for training: reads, splits and encodes them, and adds the teacher's answers."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from app.contracts.distillation import Distillation
from worker.distill.data.answer_cache import AnswerFile, AnswerSampling, OnProgress, ask
from worker.distill.data.answer_filters import is_rejected
from worker.distill.data.answer_progress import AnswerProgress, share_of
from worker.distill.data.answer_states import AnswerStates
from worker.distill.data.rows import Encoder, Example, Row, first_row, read_rows
from worker.distill.data.sampler import Generation, Sampler
from worker.distill.data.split import Split, count_sharing, hold_out, keep_apart
from worker.errors import InvalidTrainingFile, UnsupportedModel
from worker.models.architectures import context_tokens, kind_of
from worker.protocol.run_lines import MessageLine, Sink, StageLine
from worker.protocol.run_spec import RunSpec

UNCUT_TOKENS = 2**30


@dataclass(frozen=True)
class Rows:
    """Training and held-out rows as the student encodes them, in the order of their files.

    `teacher` holds the same rows as the teacher encodes them: first those of `train`, then those of
    `valid`. If both models encode rows alike, these are the same examples.
    """

    train: list[Example]
    valid: list[Example]
    teacher: list[Example]
    valid_rows: list[Row]
    answers: AnswerFile
    answer_keys: tuple[str, ...] = ()
    max_tokens: int = 512  # limit for a row, for both the student and the teacher
    # counts of rows that share a question, for the result
    shared: dict[str, int] = field(default_factory=dict)
    # states of the answers that this run has generated, and the key of each row of `teacher` there
    states: AnswerStates | None = None
    state_keys: dict[int, str] = field(default_factory=dict)

    def inputs_sha256(self, block: Distillation, seed: int) -> str:
        """Returns a hash of all inputs that training depends on. Test rows are not among them."""
        spec = block.model_dump(mode="json", exclude={"evaluation": {"test_file"}})
        parts = [spec, seed]
        parts += [[row.token_ids, row.spans] for row in (*self.train, *self.valid)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def states_of(self, index: int) -> Tensor | None:
        """Returns the LM head's inputs at the targets of `teacher[index]`, if they were kept."""
        if self.states is None or index not in self.state_keys:
            return None
        return self.states.get(self.state_keys[index], self.teacher[index].num_targets)

    @property
    def num_answered(self) -> int:
        """Number of rows that the teacher answered."""
        return len(self.answer_keys)


@dataclass(frozen=True)
class Reader:
    """Configuration and tokenizer of a model, which determine how it encodes rows."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase

    def encoder(self, *, max_tokens: int, is_last_only: bool) -> Encoder:
        kind = kind_of(self.config)
        return Encoder(
            self.tokenizer,
            max_tokens=max_tokens,
            shape=kind,
            start_id=start_id_of(self.config) if kind == "seq2seq" else None,
            is_last_only=is_last_only,
        )


def start_id_of(config: PretrainedConfig) -> int:
    """Returns the token that precedes the answer in the decoder of an encoder-decoder.

    Raises UnsupportedModel if the configuration names none.
    """
    for name in ("decoder_start_token_id", "bos_token_id"):
        found = getattr(config, name, None)
        if found is not None:
            return int(found)
    raise UnsupportedModel(
        "the encoder-decoder's config has no decoder_start_token_id; add it and import the model again"
    )


@dataclass(frozen=True)
class Preparation:
    """Prepares the rows of a run.

    `sampler` returns the teacher's sampler. It is called only if the teacher has to answer rows.
    `states` keeps the states of the answers that it generates.
    `has_one_tokenizer` says that teacher and student share a tokenizer; they may still encode rows
    differently. `check_stop` raises if the run has to stop. The answers until then are saved.
    """

    spec: RunSpec
    teacher: Reader
    student: Reader
    has_one_tokenizer: bool
    answers: AnswerFile
    sampler: Callable[[], Sampler]
    sink: Sink
    check_stop: Callable[[], None]
    states: AnswerStates | None = None

    def rows(self) -> Rows:
        """Returns the training and the held-out rows. Test rows are only checked.

        Raises:
            InvalidTrainingFile: A row cannot be used.
            TeacherGenerationFailed: The teacher did not answer a row.
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
        """Returns the test rows as `valid`, with an empty `train`.

        `tell` is called with the share of rows that the teacher has answered. A row with an empty
        answer is left out, because it has no targets to evaluate.
        """
        assert self.spec.test_path is not None
        return self._completed([], read_rows(self.spec.test_path), tell)

    def _completed(
        self,
        train_rows: list[Row],
        valid_rows: list[Row],
        tell: Callable[[float], None] | None = None,
    ) -> Rows:
        """Returns the rows as both models encode them, with the teacher's answers.

        `tell` is given for test rows only.
        """
        rows = [_as_asked(row, self.spec.distillation) for row in train_rows]
        rows += [self._as_held_out(row) for row in valid_rows]
        teachers = [self._teacher_encoder.encode(row) for row in rows]
        students = (
            teachers if self._reads_alike else [self._student_encoder.encode(row) for row in rows]
        )
        if self.spec.resume_dir is not None and (self.spec.resume_dir / "answers.jsonl").exists():
            self.answers.merge(self.spec.resume_dir / "answers.jsonl")
        answers, keys = self._answers(teachers, tell)
        key_of = dict(zip(answers, keys, strict=True))
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
            states=self.states,
            state_keys={place: key_of[i] for place, i in enumerate(kept) if i in key_of},
        )

    @property
    def _reads_alike(self) -> bool:
        one, other = self.teacher, self.student
        kinds = {kind_of(one.config), kind_of(other.config)}
        if kinds == {"seq2seq"}:
            return self.has_one_tokenizer and start_id_of(one.config) == start_id_of(other.config)
        return self.has_one_tokenizer and "seq2seq" not in kinds

    @property
    def _is_last_only(self) -> bool:
        return "seq2seq" in (kind_of(self.teacher.config), kind_of(self.student.config))

    @cached_property
    def _teacher_encoder(self) -> Encoder:
        return self.teacher.encoder(max_tokens=self._max_tokens, is_last_only=self._is_last_only)

    @cached_property
    def _student_encoder(self) -> Encoder:
        return self.student.encoder(max_tokens=self._max_tokens, is_last_only=self._is_last_only)

    @cached_property
    def _long_encoder(self) -> Encoder:
        """The student's encoder without a token limit, for answers that are cut later."""
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
        """Returns the number of test rows that share a question with other rows. Warns if any do.

        Raises InvalidTrainingFile for test rows that cannot be evaluated, so that the run fails
        before training instead of after it.
        """
        assert self.spec.test_path is not None
        try:
            rows = read_rows(self.spec.test_path)
            for row in rows:
                asked = self._as_held_out(row)
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
                "training rows): their metrics are too optimistic",
                num_shared=num_shared,
                num_shared_with_training=num_train,
            )
        return num_shared

    @cached_property
    def _is_training_answered(self) -> bool:
        """True if the training rows have completions. All of them have, or none has."""
        return first_row(self.spec.training_path).is_answered

    def _as_held_out(self, row: Row) -> Row:
        """Returns a held-out row or a test row as the job uses it.

        If the teacher answers the training rows because they have no completions, it keeps its own.
        """
        if row.is_answered and not self._is_training_answered:
            return row
        return _as_asked(row, self.spec.distillation)

    def _demand_completion(self, example: Example) -> None:
        """Raises InvalidTrainingFile if the row needs an answer from a masked teacher."""
        if not example.spans and kind_of(self.teacher.config) == "masked":
            raise InvalidTrainingFile(
                f"line {example.line} has no completion, and {self.teacher.config.model_type} does not generate text: "
                "add completions, or use another teacher"
            )

    @property
    def _max_tokens(self) -> int:
        contexts = [context_tokens(reader.config) for reader in (self.teacher, self.student)]
        return min(self.spec.distillation.hyperparameters.max_sequence_tokens, *contexts)

    def _answers(
        self, examples: list[Example], tell: Callable[[float], None] | None
    ) -> tuple[dict[int, Generation], tuple[str, ...]]:
        """Returns the teacher's answers to rows without completion, by row, and the cache keys."""
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
            is_prompt_apart=kind_of(self.teacher.config) == "seq2seq",
        )
        prompts = [examples[i].prompt_ids for i in waiting]
        on_progress: OnProgress
        if tell is None:
            self.sink(StageLine(name="generating_teacher_data"))
            on_progress = AnswerProgress(self.sink, self.check_stop)
        else:
            on_progress = share_of(tell)
        made = ask(prompts, how, self.answers, self.sampler, on_progress, self.states)
        self._warn_of_cut(made)
        for i, answer in zip(waiting, made, strict=True):
            if not answer.tokens and tell is None:
                raise InvalidTrainingFile(
                    f"the teacher's answer to line {examples[i].line} is empty; remove the line"
                )
        return dict(zip(waiting, made, strict=True)), tuple(how.key(prompt) for prompt in prompts)

    def _answered(
        self, row: Row, teacher: Example, student: Example, answer: Generation | None
    ) -> tuple[Example, Example]:
        """Returns the row with its answer, as the teacher and as the student encode it.

        With one tokenizer both have the same targets, cut to what the student's sequence can hold.
        With two tokenizers the answer's text is encoded again for the student.
        """
        if answer is None:
            return teacher, student
        if self.has_one_tokenizer:
            # the student's prompt may be longer than the teacher's
            room = self._max_tokens - len(student.token_ids)
            tokens = answer.tokens[: max(1, room)]
            return teacher.answered(tokens), student.answered(tokens)
        text = str(self.teacher.tokenizer.decode(answer.tokens, skip_special_tokens=True))
        turn = {"role": "assistant", "content": text}
        whole = replace(
            row, messages=(*row.messages, turn), unlearned=frozenset(range(len(row.messages)))
        )
        student = self._long_encoder.encode(whole)
        room = self._max_tokens - len(student.token_ids) + len(student.completion_ids)
        # the student may need more tokens for the same text
        if len(student.completion_ids) > room:
            return teacher.answered(answer.tokens), student.answered(
                student.completion_ids[: max(1, room)]
            )
        if not answer.is_finished and student.completion_ids[-1] == self._student_encoder.end_id:
            student = student.answered(student.completion_ids[:-1] or student.completion_ids)
        return teacher.answered(answer.tokens), student

    def _kept(self, answers: dict[int, Generation], num_train: int, num_rows: int) -> list[int]:
        """Returns the indices of the rows whose answers pass the reject rules.

        An empty answer never passes. Raises InvalidTrainingFile if no rows of a kind remain.
        """
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
            raise InvalidTrainingFile(f"data.reject leaves no {names} rows; relax its rules")
        return kept

    def _warn_of_cut(self, made: list[Generation]) -> None:
        num_cut = sum(not answer.is_finished for answer in made)
        if num_cut:
            self._warn(
                f"{num_cut} of {len(made)} answers did not end within {self.spec.distillation.data.max_new_tokens} tokens; "
                "students learn to stop from complete answers, so raise data.max_new_tokens if many are cut off",
                num_cut=num_cut,
            )

    def _warn(self, message: str, **data: object) -> None:
        self.sink(MessageLine(level="warn", message=message, data=data))


def _as_asked(row: Row, block: Distillation) -> Row:
    """Returns the row with its completion, or only its question if the teacher has to answer it.

    Raises InvalidTrainingFile if the row does not suit `data.completions`.
    """
    mode, then = block.data.completions, block.objective.then
    writers = {mode, then and then.completions} - {None, "dataset"}
    if row.text is not None and writers:
        raise InvalidTrainingFile(
            f"line {row.line} is plain text, which has no prompt to answer (completions "
            f"{', '.join(sorted(map(str, writers)))}); use prompt or messages"
        )
    if mode == "teacher":
        return row.question
    if mode == "dataset" and not row.is_answered:
        raise InvalidTrainingFile(
            f'line {row.line} has no completion, and data.completions is "dataset"'
        )
    return row
