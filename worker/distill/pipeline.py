"""A whole distillation: rows, the teacher's answers, the training, the judgement, the student's folder."""

import gc
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from worker.distill.answers import AnswerFile
from worker.distill.checkpoint import TrainState, file_sha256, link_folder, load_state
from worker.distill.errors import VocabMismatch
from worker.distill.evaluate import HeldOut, HeldOutRows
from worker.distill.fresh import fresh_config
from worker.distill.heads import Head, head_of, load_head
from worker.distill.masked import MaskedTeacher
from worker.distill.objectives import TokenObjective
from worker.distill.pace import Throttle
from worker.distill.preparation import ANSWERED_PERCENT, LOADED_PERCENT, Preparation, Reader, Rows
from worker.distill.progress import MessageLine, ProgressLine, Sink, StageLine
from worker.distill.report import Judge, View
from worker.distill.sampler import Sampler
from worker.distill.shapes import read_config, shape_of
from worker.distill.signals import Signal, choose_signal
from worker.distill.spec import RunSpec
from worker.distill.students import StudentRecipe, load_model, plan_student
from worker.distill.teachers import CachedTeacher, LiveTeacher, Teacher, cached_teacher
from worker.distill.trainer import Setup, Stopped, Trainer
from worker.gemm import pack_weights

SamplerFor = Callable[[PreTrainedModel], Sampler]


@dataclass(frozen=True)
class Outcome:
    """The student's folder (relative to the run's) and what the public result says of it."""

    folder: str
    result: dict[str, Any]  # Any: open-ended JSON
    trained_tokens: int


def distil(
    spec: RunSpec, out: Path, sink: Sink, sampler_for: SamplerFor, should_stop: Callable[[], bool]
) -> Outcome:
    """Runs `spec` to its end, or on from `spec.resume_dir`.

    Raises Stopped when asked to stop, and DistillError for what trying again will not mend.
    """
    return Pipeline(spec, out, sink, sampler_for, should_stop).run()


class Pipeline:
    """One run; its methods are its stages, in order."""

    def __init__(
        self, spec: RunSpec, out: Path, sink: Sink, sampler_for: SamplerFor, should_stop: Callable[[], bool]
    ) -> None:
        self.spec = spec
        self.out = out
        self.sink = sink
        self.sampler_for = sampler_for
        self.should_stop = should_stop
        self.block = spec.distillation
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.throttle = Throttle()
        self.trains_from = LOADED_PERCENT
        out.mkdir(parents=True, exist_ok=True)

    def run(self) -> Outcome:
        self.sink(StageLine(name="loading_models"))
        state = self._resumed_state()
        self._set_threads(state)
        recipe = plan_student(
            self.spec.teacher_dir, self.spec.start_dir, self.block.student, seed=self.spec.seed
        )
        signal = self._signal
        if signal.name != "logits":
            self.sink(MessageLine(message=f"teacher signal: {signal.name} ({signal.reason})"))
        rows = self._rows()
        if rows.num_answered:
            self.trains_from = ANSWERED_PERCENT
        teacher = self._cached_teacher(rows, recipe)
        try:
            setup = self._setup(rows, recipe, teacher, state)
            self._check_resumed(state, setup)
            now = {"inputs_sha256": setup.inputs_sha256, "num_threads": torch.get_num_threads()}
            state = state.model_copy(update=now)
            self.sink(StageLine(name="training"))
            trainer = Trainer(setup, state, self.sink, self.should_stop, report=self._training_percent)
            state, best_dir = trainer.run()
            num_steps, valid = trainer.total_steps, trainer.valid
            del trainer
            gc.collect()  # modules refer to each other in cycles; their memory is wanted for the judgement
            self.sink(StageLine(name="evaluating"))
            result = self._judge(rows, teacher, valid, state).report(recipe, best_dir, rows.answers)
        finally:
            teacher.close()
        self.sink(StageLine(name="exporting"))
        link_folder(best_dir, self.out / "student")
        counts = {"num_train_rows": len(rows.train), "num_validation_rows": len(rows.valid)}
        steps = {"num_steps": state.step, "num_planned_steps": num_steps, "best_step": state.best_step}
        times = {"train_seconds": round(state.trained_seconds, 1), "stopped_early": state.is_done}
        used = {"teacher_signal": signal.name, "num_teacher_rows_computed": teacher.num_computed}
        return Outcome("student", {**result, **counts, **steps, **times, **used}, state.trained_tokens)

    @cached_property
    def _teacher_reader(self) -> Reader:
        return Reader(read_config(self.spec.teacher_dir), _tokenizer(self.spec.teacher_dir))

    @cached_property
    def _student_reader(self) -> Reader:
        fresh = self.block.student.config
        if fresh is not None:
            tokenizer = self._teacher_reader.tokenizer
            return Reader(fresh_config(fresh, tokenizer), tokenizer)
        return Reader(read_config(self.spec.start_dir), _tokenizer(self.spec.start_dir))

    @cached_property
    def _has_one_tokenizer(self) -> bool:
        """Equal widths are no proof: the vocabularies are compared."""
        return bool(self._teacher_reader.tokenizer.get_vocab() == self._student_reader.tokenizer.get_vocab())

    @cached_property
    def _signal(self) -> Signal:
        return choose_signal(
            self.block.objective.teacher_signal,
            shape_of(self._teacher_reader.config),
            shape_of(self._student_reader.config),
            has_one_tokenizer=self._has_one_tokenizer,
        )

    @cached_property
    def _identity(self) -> str:
        """Whose answers and hidden states are on file."""
        tokenizer = self._teacher_reader.tokenizer
        return f"{folder_sha256(self.spec.teacher_dir)}:{tokenizer_sha256(tokenizer)}"

    def _rows(self) -> Rows:
        return Preparation(
            spec=self.spec,
            teacher=self._teacher_reader,
            student=self._student_reader,
            has_one_tokenizer=self._has_one_tokenizer,
            answers=AnswerFile(self.spec.cache_dir / "answers" / f"{_short(self._identity)}.jsonl"),
            sampler=lambda: self.sampler_for(self._load_teacher()),
            sink=self.sink,
            check_stop=lambda: self._check_stop(step=0),
        ).rows()

    def _resumed_state(self) -> TrainState:
        if self.spec.resume_dir is None:
            return TrainState(num_threads=self.spec.num_threads or torch.get_num_threads())
        return load_state(self.spec.resume_dir)

    def _set_threads(self, state: TrainState) -> None:
        """The order of sums, and so a run's bits, depends on the threads: a resumed run keeps its number."""
        wanted = self.spec.num_threads or state.num_threads
        if wanted != state.num_threads:
            self._warn(
                f"the checkpoint was made with {state.num_threads} threads and the run goes on with {wanted}: it will be "
                "close to, but not bit for bit, the uninterrupted one"
            )
        torch.set_num_threads(wanted)
        if self.device == "cpu":
            torch.use_deterministic_algorithms(True)

    def _check_resumed(self, state: TrainState, setup: Setup) -> None:
        if self.spec.resume_dir is not None and state.inputs_sha256 != setup.inputs_sha256:
            self._warn(
                "the job's inputs have changed since the checkpoint: the run goes on, but not bit for bit"
            )

    def _load_teacher(self) -> PreTrainedModel:
        teacher = load_model(self.spec.teacher_dir).to(self.device)
        pack_weights(teacher)
        return teacher.requires_grad_(False)

    def _live_teacher(self) -> Teacher:
        model = self._load_teacher()
        if shape_of(model.config) == "masked":
            return MaskedTeacher(model, self._teacher_reader.tokenizer.mask_token_id)
        return LiveTeacher(model)

    def _cached_teacher(self, rows: Rows, recipe: StudentRecipe) -> CachedTeacher:
        head = load_head(self.spec.teacher_dir, len(self._teacher_reader.tokenizer))
        bias_V = None if head.bias_V is None else head.bias_V.to(self.device)
        head = replace(head, weight_VH=head.weight_VH.to(self.device), bias_V=bias_V)
        return cached_teacher(
            self._live_teacher,
            head,
            folder=self.spec.cache_dir / "teacher",
            budget_bytes=self.spec.cache_bytes,
            identity=f"{self._identity}:{self._signal.name}",
            examples=rows.teacher,
            keeps="expected" if self._is_expectation_enough(recipe, head) else "hidden",
        )

    def _is_expectation_enough(self, recipe: StudentRecipe, head: Head) -> bool:
        objective = self.block.objective
        if self._signal.name != "logits":
            return False
        is_kl = objective.divergence == "forward_kl" and objective.temperature == 1.0
        is_kl = is_kl and objective.temperature_end in (None, 1.0)
        is_kl = is_kl and (objective.then is None or objective.then.divergence == "forward_kl")
        is_copied = recipe.freeze_head and head.softcap is None
        return is_kl and is_copied and _is_head_of(recipe.start_dir, head)

    def _setup(
        self,
        rows: Rows,
        recipe: StudentRecipe,
        teacher: CachedTeacher,
        state: TrainState,
    ) -> Setup:
        tokenizer = self._student_reader.tokenizer
        answers_path = None
        if rows.answer_keys:
            answers_path = self.out / "answers.jsonl"
            rows.answers.copy_to(answers_path, rows.answer_keys)
        resume_dir, best_dir = self.spec.resume_dir, None
        if resume_dir is not None and state.best_step is not None:
            # the folder we resume from may be deleted while we run: the best student so far must outlive it
            source = resume_dir / ("model" if state.best_step == state.step else "best")
            best_dir = link_folder(source, self.out / "best-before")
        return Setup(
            out=self.out,
            objective=self.block.objective.model_copy(update={"teacher_signal": self._signal.name}),
            hyperparameters=self.block.hyperparameters,
            seed=self.spec.seed,
            keep_checkpoints=self.spec.keep_checkpoints,
            recipe=recipe,
            tokenizer=tokenizer,
            num_tokens=len(tokenizer),
            train=rows.train,
            valid=rows.valid,
            teacher=teacher,
            signal=self._signal,
            has_one_tokenizer=self._has_one_tokenizer,
            answers_path=answers_path,
            inputs_sha256=self._inputs_sha256(rows),
            device=self.device,
            resume_dir=resume_dir,
            best_dir=best_dir,
        )

    def _judge(self, rows: Rows, teacher: CachedTeacher, valid: HeldOutRows, state: TrainState) -> Judge:
        objective = TokenObjective.from_objective(self.block.objective)
        num_train = len(rows.train)
        teachers_valid = HeldOutRows(
            rows.teacher[num_train:],
            first_index=num_train,
            batch_tokens=valid.batch_tokens,
            device=self.device,
        )

        def measure(model: PreTrainedModel) -> HeldOut:
            head = head_of(model, len(self._student_reader.tokenizer))
            return valid.measure(model, head, teacher if self._has_one_tokenizer else None, objective)

        def measure_teacher(model: PreTrainedModel) -> HeldOut:
            if shape_of(model.config) == "masked":
                return teachers_valid.measure_teacher(teacher, objective)
            head = head_of(model, len(self._teacher_reader.tokenizer))
            return teachers_valid.measure(model, head, teacher, objective)

        def tell(share: float) -> None:
            self._check_stop(step=state.step)
            if self.throttle.is_due():
                self.sink(ProgressLine(percent=round(90.0 + 9.0 * share, 1), step=state.step))

        return Judge(
            spec=self.spec,
            student_view=View(rows.valid, self._student_reader.tokenizer, measure),
            teacher_view=View(teachers_valid.examples, self._teacher_reader.tokenizer, measure_teacher),
            valid_rows=rows.valid_rows,
            device=self.device,
            sampler_for=self.sampler_for,
            on_progress=tell,
            warn=self._warn,
        )

    def _inputs_sha256(self, rows: Rows) -> str:
        parts = [self.block.model_dump(mode="json"), self.spec.seed]
        parts += [[row.token_ids, row.spans] for row in (*rows.train, *rows.valid)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _training_percent(self, share: float) -> float:
        return round(self.trains_from + (90.0 - self.trains_from) * share, 1)

    def _check_stop(self, *, step: int) -> None:
        if self.should_stop():
            raise Stopped(step)

    def _warn(self, message: str) -> None:
        self.sink(MessageLine(level="warn", message=message))


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    return loaded


def _is_head_of(folder: Path, head: Head) -> bool:
    try:
        own = load_head(folder, head.num_tokens)
    except VocabMismatch:
        return False
    if own.weight_VH.shape != head.weight_VH.shape or (own.bias_V is None) != (head.bias_V is None):
        return False
    if own.scale != head.scale:
        return False
    is_bias_equal = own.bias_V is None or head.bias_V is None or torch.equal(own.bias_V, head.bias_V)
    return is_bias_equal and torch.equal(own.weight_VH, head.weight_VH.cpu())


def folder_sha256(folder: Path) -> str:
    """Of a model's configuration and weights."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(f"{path.name}:{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _short(identity: str) -> str:
    return hashlib.sha256(identity.encode()).hexdigest()[:32]
