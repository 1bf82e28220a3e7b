"""A whole distillation: rows, the teacher's answers, the training, the judgement, the student's folder."""

import gc
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from worker.distill.answers import AnswerFile
from worker.distill.batches import kept_positions, model_input
from worker.distill.checkpoint import TrainState, file_sha256, link_folder, load_state
from worker.distill.errors import TokenizerMismatch
from worker.distill.evaluate import HeldOutRows
from worker.distill.heads import Head, head_of, load_head
from worker.distill.objectives import TokenObjective
from worker.distill.pace import Throttle
from worker.distill.preparation import ANSWERED_PERCENT, LOADED_PERCENT, Preparation, Rows
from worker.distill.progress import MessageLine, ProgressLine, Sink, StageLine
from worker.distill.report import Judge
from worker.distill.sampler import Sampler
from worker.distill.spec import RunSpec
from worker.distill.students import StudentRecipe, load_model, plan_student
from worker.distill.teachers import CachedTeacher, cached_teacher
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
        tokenizer = self._tokenizer()
        recipe = plan_student(self.spec.teacher_dir, self.spec.start_dir, self.block.student)
        identity = f"{folder_sha256(self.spec.teacher_dir)}:{tokenizer_sha256(tokenizer)}"
        rows = Preparation(
            spec=self.spec,
            tokenizer=tokenizer,
            answers=AnswerFile(self.spec.cache_dir / "answers" / f"{_short(identity)}.jsonl"),
            sampler=lambda: self.sampler_for(self._load_teacher()),
            sink=self.sink,
            check_stop=lambda: self._check_stop(step=0),
        ).rows()
        if rows.num_answered:
            self.trains_from = ANSWERED_PERCENT
        head = load_head(self.spec.teacher_dir, len(tokenizer))
        head = replace(head, weight_VH=head.weight_VH.to(self.device))
        teacher = self._teacher(rows, head, recipe, identity)
        try:
            setup = self._setup(rows, tokenizer, recipe, teacher, state)
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
            result = self._judge(rows, tokenizer, teacher, valid, state).report(
                recipe, best_dir, rows.answers
            )
        finally:
            teacher.close()
        self.sink(StageLine(name="exporting"))
        link_folder(best_dir, self.out / "student")
        counts = {"num_train_rows": len(rows.train), "num_validation_rows": len(rows.valid)}
        steps = {"num_steps": state.step, "num_planned_steps": num_steps, "best_step": state.best_step}
        times = {"train_seconds": round(state.trained_seconds, 1), "stopped_early": state.is_done}
        return Outcome("student", {**result, **counts, **steps, **times}, state.trained_tokens)

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

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        ours, teachers = (
            AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            for folder in (self.spec.start_dir, self.spec.teacher_dir)
        )
        if ours.get_vocab() != teachers.get_vocab():
            raise TokenizerMismatch(
                f"student and teacher have different tokenizers ({len(ours)} and {len(teachers)} tokens); pick a pair that "
                "shares one"
            )
        tokenizer: PreTrainedTokenizerBase = ours
        return tokenizer

    def _load_teacher(self) -> PreTrainedModel:
        teacher = load_model(self.spec.teacher_dir).to(self.device)
        pack_weights(teacher)
        return teacher.requires_grad_(False)

    def _teacher(self, rows: Rows, head: Head, recipe: StudentRecipe, identity: str) -> CachedTeacher:
        objective = self.block.objective
        is_kl = objective.divergence == "forward_kl" and objective.temperature == 1.0
        is_kl = is_kl and (objective.then is None or objective.then.divergence == "forward_kl")
        has_teachers_head = (
            recipe.freeze_head and head.softcap is None and _is_head_of(recipe.start_dir, head)
        )
        return cached_teacher(
            self._load_teacher,
            head,
            folder=self.spec.cache_dir / "teacher",
            budget_bytes=self.spec.cache_bytes,
            identity=identity,
            rows=[(model_input(row), kept_positions(row)) for row in (*rows.train, *rows.valid)],
            keeps="expected" if is_kl and has_teachers_head else "hidden",
        )

    def _setup(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        recipe: StudentRecipe,
        teacher: CachedTeacher,
        state: TrainState,
    ) -> Setup:
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
            objective=self.block.objective,
            hyperparameters=self.block.hyperparameters,
            seed=self.spec.seed,
            keep_checkpoints=self.spec.keep_checkpoints,
            recipe=recipe,
            tokenizer=tokenizer,
            num_tokens=len(tokenizer),
            train=rows.train,
            valid=rows.valid,
            teacher=teacher,
            answers_path=answers_path,
            inputs_sha256=self._inputs_sha256(rows),
            device=self.device,
            resume_dir=resume_dir,
            best_dir=best_dir,
        )

    def _judge(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        teacher: CachedTeacher,
        valid: HeldOutRows,
        state: TrainState,
    ) -> Judge:
        objective = TokenObjective.from_objective(self.block.objective)

        def measure(model: PreTrainedModel) -> dict[str, float]:
            return valid.measure(model, head_of(model, len(tokenizer)), teacher, objective).series()

        def tell(share: float) -> None:
            self._check_stop(step=state.step)
            if self.throttle.is_due():
                self.sink(ProgressLine(percent=round(90.0 + 9.0 * share, 1), step=state.step))

        return Judge(
            spec=self.spec,
            valid=rows.valid,
            valid_rows=rows.valid_rows,
            tokenizer=tokenizer,
            device=self.device,
            sampler_for=self.sampler_for,
            measure=measure,
            on_progress=tell,
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


def _is_head_of(folder: Path, head: Head) -> bool:
    own = load_head(folder, head.num_tokens)
    if own.weight_VH.shape != head.weight_VH.shape or (own.bias_V is None) != (head.bias_V is None):
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
