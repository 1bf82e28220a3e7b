"""Runs a training job: rows, teacher answers, training, evaluation, and the student's folder."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from app.contracts.batch_plan import batch_tokens_of
from worker.distill.data.answer_cache import AnswerFile
from worker.distill.data.answer_progress import ANSWERED_PERCENT, LOADED_PERCENT
from worker.distill.data.dataset import Preparation, Rows
from worker.distill.data_parallel import ALONE, Ranks
from worker.distill.evaluation.report import Evaluator, Tell, before_and_after
from worker.distill.evaluators import Evaluators, SamplerFor
from worker.distill.ladder_files import ladder_files
from worker.distill.model_pair import ModelPair
from worker.distill.phase_times import PhaseTimes
from worker.distill.resumed_state import changed_inputs, changes_since, step_tokens
from worker.distill.rows_before_training import answer_states, compute_rows, keep_answered
from worker.distill.run_costs import cost_of
from worker.distill.student_runs import (
    StudentRun,
    calibrated,
    kept_layers,
    plan_student_runs,
    with_measured_layers,
)
from worker.distill.student_sweep import (
    EvaluatorFor,
    SelectedStudent,
    StudentSweep,
)
from worker.distill.students.recipe import StudentRecipe, load_model, num_parameters
from worker.distill.teacher_quality import teacher_quality
from worker.distill.teachers.cached_teacher import CachedTeacher
from worker.distill.training.automatic_values import NEWEST_DEFAULTS, with_decisions
from worker.distill.training.checkpoint import TrainState, copy_model, link_folder, load_state
from worker.distill.training.devices import find_device
from worker.distill.training.inputs import TrainingInputs
from worker.distill.training.rollouts import check_rollouts, plan_rollouts
from worker.distill.training.trainer import Stopped
from worker.models.vocabulary import num_token_ids
from worker.models.vocabulary_trimming import check_trimmable, trim_vocabulary
from worker.protocol.run_lines import MessageLine, ProgressLine, Sink, StageLine, Throttle
from worker.protocol.run_spec import RunSpec


@dataclass(frozen=True)
class Outcome:
    """The student's folder, relative to the run's folder, and its public result."""

    folder: str
    result: dict[str, Any]  # Any: open-ended JSON
    trained_tokens: int
    files: tuple[str, ...] = ()  # offered for download; relative to the run's folder


def distil(
    spec: RunSpec,
    out: Path,
    sink: Sink,
    sampler_for: SamplerFor,
    should_stop: Callable[[], bool],
    ranks: Ranks = ALONE,
    phases: PhaseTimes | None = None,
) -> Outcome:
    """Runs `spec` to its end, or resumes it from `spec.resume_dir`, as one of the given ranks.

    Raises Stopped if `should_stop` returns true, and WorkerError for permanent failures.
    """
    phases = phases or PhaseTimes()
    return Pipeline(spec, out, sink, sampler_for, should_stop, ranks, phases).run()


class Pipeline:
    """One run. Its methods are its stages, in order."""

    def __init__(
        self,
        spec: RunSpec,
        out: Path,
        sink: Sink,
        sampler_for: SamplerFor,
        should_stop: Callable[[], bool],
        ranks: Ranks,
        phases: PhaseTimes,
    ) -> None:
        self.spec = spec
        self.out = out
        self.sink = sink
        self.sampler_for = sampler_for
        self.should_stop = should_stop
        self.block = spec.distillation
        self.ranks = ranks
        self.phases = phases
        asked = self.block.hyperparameters.precision
        resumed = None if spec.resume_dir is None else load_state(spec.resume_dir).precision
        card = find_device(ranks.number, asked, resumed)
        self.device = card.name
        self.pair = ModelPair(spec, self.device, card=card)
        out.mkdir(parents=True, exist_ok=True)

    def run(self) -> Outcome:
        self.sink(StageLine(name="loading_models"))
        state = self._resumed_state()
        self._set_threads(state)
        runs = plan_student_runs(self.spec)
        signal = self.pair.signal
        if self.block.student.vocabulary == "rows":
            check_trimmable(self.pair.student.config, self.pair.student_dir)
        check_rollouts(self.block, signal, has_one_tokenizer=self.pair.has_one_tokenizer)
        sink = self.sink if self.spec.resume_dir is None else None
        state = with_decisions(state, self.block, signal, self.pair.card, sink=sink)
        with self.phases.phase("teacher"):
            rows, quality = self._prepare(state)
        with self.phases.phase("layer_fit"):
            runs = self._measured(runs, rows, state)
        teacher = self._teacher(rows, runs[0].recipe)
        with ExitStack() as open_teachers:
            if teacher is not None:
                open_teachers.callback(teacher.close)
            setup = self._setup(rows, runs[0].recipe, teacher, state)
            self._check_resumed(state, setup, teacher)
            if teacher is not None:
                self._place_teacher(teacher)
            now = {
                "inputs_sha256": setup.inputs_sha256,
                "num_threads": torch.get_num_threads(),
                "num_processes": self.ranks.count,
                "precision": self.pair.card.precision,
                "kept_layers": kept_layers(runs),
                "teacher_quality": quality,
                "has_kept_rows": state.has_kept_rows or bool(teacher and teacher.num_kept),
                "batch_tokens": step_tokens(self.spec, state, rows.train, self.device, self.ranks),
            }
            taught = StudentSweep(
                runs,
                setup,
                state.model_copy(update=now),
                evaluation=self.block.evaluation,
                evaluator_for=lambda tell: self._evaluators().of(rows, teacher, tell),
                test_evaluator_for=self._test_evaluator_for(runs[0].recipe, teacher, open_teachers),
                sink=self.sink,
                should_stop=self.should_stop,
                trains_from=ANSWERED_PERCENT
                if rows.num_answered or self.pair.adapted_dir
                else LOADED_PERCENT,
            )
            selected = taught.run(rows.answers)
        self.sink(StageLine(name="exporting"))
        num_computed = int(self.ranks.sum(teacher.num_computed if teacher else 0)[0])
        if not self.ranks.is_first:
            return Outcome("student", selected.result, taught.trained_tokens)
        result = self._result(rows, selected, num_computed)
        if quality is not None:
            result["teacher_quality"] = quality
        with self.phases.phase("saving"):
            self._save_student(selected, rows, result)
        num_kept = teacher.num_kept if teacher else 0
        result |= cost_of(self.pair, rows, self.phases, taught.state, num_computed, num_kept)
        files = ladder_files(selected, self.block, self.out, result, self.sink)
        return Outcome("student", result, taught.trained_tokens, files)

    def _prepare(self, state: TrainState) -> tuple[Rows, dict[str, Any] | None]:
        """Adapts the teacher. Returns the rows, and what the result says on a quantised teacher."""
        # the first rank generates the teacher's answers, and the others read them from disk
        rows = self.ranks.first_then_others(lambda: self._preparation().rows())
        self.pair = self.ranks.first_then_others(lambda: self._adapted_pair(rows))
        quality = teacher_quality(
            self.pair, rows, state, ranks=self.ranks, sink=self.sink, check_stop=self._check_stop
        )
        return rows, quality

    def _measured(self, runs: list[StudentRun], rows: Rows, state: TrainState) -> list[StudentRun]:
        """Returns the runs with what is measured on the training rows before the training."""
        return with_measured_layers(
            calibrated(runs, rows.train),
            rows.train,
            state=None if self.spec.resume_dir is None else state,
            matmul_dtype=self.pair.card.matmul_dtype,
            placement=self.pair.placement,
            ranks=self.ranks,
            sink=self.sink,
        )

    def _save_student(self, selected: SelectedStudent, rows: Rows, result: dict[str, Any]) -> None:
        """Writes the student's folder, with a trimmed vocabulary if the job requests it."""
        if self.block.student.vocabulary == "all":
            copy_model(selected.folder, self.out / "student", self.pair.card.autocast)
            return
        used = {
            token
            for example in (*rows.train, *rows.valid)
            for token in (*example.token_ids, *example.source_ids)
        }
        model = load_model(selected.folder, self.pair.card.autocast or torch.float32)
        before = num_parameters(model)
        num_kept = trim_vocabulary(model, selected.folder, used, self.out / "student")
        result["vocabulary"] = {
            "num_tokens": num_kept,
            "num_tokens_before": num_token_ids(self.pair.student.tokenizer),
            "num_parameters": num_parameters(model),
            "num_parameters_before": before,
        }

    def _result(self, rows: Rows, selected: SelectedStudent, num_computed: int) -> dict[str, Any]:
        """Returns the public result: the evaluation, and the counts of rows it rests on."""
        counts = {
            "num_train_rows": len(rows.train),
            "num_validation_rows": len(rows.valid),
            **rows.shared,
        }
        if not self.spec.has_teacher:
            return {**before_and_after(selected.result), **counts}
        return {
            **selected.result,
            **counts,
            "teacher_signal": self.pair.signal.name,
            "teacher_signal_reason": self.pair.signal.reason,
            "num_teacher_rows_computed": num_computed,
            "teacher_passes": round(num_computed / len(rows.teacher), 3),
        }

    def _teacher(self, rows: Rows, recipe: StudentRecipe) -> CachedTeacher | None:
        """Returns the teacher with its row cache, or None if the run has no teacher."""
        if not self.spec.has_teacher:
            return None
        # the first rank decides whether there is a row cache, and the others follow
        teacher = self.ranks.first_then_others(lambda: self._opened(rows, recipe, self.sink))
        for note in teacher.notes:
            self.sink(MessageLine(message=note))
        return teacher

    def _opened(self, rows: Rows, recipe: StudentRecipe, sink: Sink | None) -> CachedTeacher:
        teacher = self.pair.cached_teacher(rows, recipe)
        teacher.phases = self.phases
        with self.phases.phase("teacher"):
            keep_answered(teacher, rows, sink, self._check_stop)
        return teacher

    def _place_teacher(self, teacher: CachedTeacher) -> None:
        """Reports the placement. Fills the row cache if it must be complete before the training."""
        placed = self.pair.placement
        if placed.message:
            self.sink(MessageLine(message=placed.message))
        if not teacher.is_cached or not (placed.is_teacher_first or self.ranks.count > 1):
            return
        compute_rows(teacher, self.ranks, self.pair.micro_tokens, self.sink, self._check_stop)

    def _preparation(self) -> Preparation:
        return Preparation(
            spec=self.spec,
            teacher=self.pair.teacher,
            student=self.pair.student,
            has_one_tokenizer=self.pair.has_one_tokenizer,
            answers=AnswerFile(self.pair.answers_path if self.spec.has_teacher else None),
            sampler=lambda: self.sampler_for(self.pair.load_answering_teacher()),
            sink=self.sink,
            check_stop=self._check_stop,
            states=answer_states(self.pair, self.out),
        )

    def _adapted_pair(self, rows: Rows) -> ModelPair:
        """Returns the pair, with its teacher adapted to the rows if the job requests it."""
        throttle = Throttle()

        def tell(step: int, num_steps: int) -> None:
            """Reports progress. Raises Stopped."""
            self._check_stop()
            if step == 0:
                self.sink(StageLine(name="adapting_teacher"))
            if throttle.is_due():
                done = LOADED_PERCENT + (ANSWERED_PERCENT - LOADED_PERCENT) * step / num_steps
                self.sink(ProgressLine(percent=round(done, 1)))

        pair = self.pair.adapted(rows, batch_tokens_of(self.block.hyperparameters), tell)
        if pair.adapted_dir is None:
            return pair
        if not self.ranks.is_first:
            return replace(pair, adapted_dir=self.out / "teacher")
        # other jobs may prune this adapted teacher, so link it into the run's own folder
        return replace(pair, adapted_dir=link_folder(pair.adapted_dir, self.out / "teacher"))

    def _resumed_state(self) -> TrainState:
        if self.spec.resume_dir is None:
            num_threads = self.spec.num_threads or torch.get_num_threads()
            return TrainState(num_threads=num_threads, defaults_version=NEWEST_DEFAULTS)
        return load_state(self.spec.resume_dir)

    def _set_threads(self, state: TrainState) -> None:
        """Sets threads and determinism. Warns if a resumed run will differ in its last bits."""
        wanted = self.spec.num_threads or state.num_threads  # the order of sums depends on it
        precision = self.pair.card.precision
        if self.spec.resume_dir is not None:
            for message in changes_since(state, wanted, self.ranks.count, precision):
                self._warn(message)
        if state.precision in (None, precision) and self.block.hyperparameters.precision not in (
            "auto",
            precision,
        ):
            self._warn("this machine does not support bfloat16 matmuls: the run uses float32")
        torch.set_num_threads(wanted)
        if self.device == "cpu":
            torch.use_deterministic_algorithms(True)
            # no code reads uninitialized memory, and to fill it takes time
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # not in the stubs

    def _check_resumed(
        self, state: TrainState, setup: TrainingInputs, teacher: CachedTeacher | None
    ) -> None:
        if self.ranks.count > 1:
            self.sink(MessageLine(message=f"{self.ranks.count} processes share every batch"))
        if self.spec.resume_dir is not None:
            for message in changed_inputs(state, setup.inputs_sha256, teacher):
                self._warn(message)

    def _setup(
        self,
        rows: Rows,
        recipe: StudentRecipe,
        teacher: CachedTeacher | None,
        state: TrainState,
    ) -> TrainingInputs:
        tokenizer = self.pair.student.tokenizer
        answers_path = None
        if rows.answer_keys:
            answers_path = self.out / "answers.jsonl"
            if self.ranks.is_first:
                rows.answers.copy_to(answers_path, rows.answer_keys)
        resume_dir, best_dir = self.spec.resume_dir, None
        if resume_dir is not None and state.best_step is not None:
            # the checkpoint may be pruned during the run, so link the best student so far
            source = resume_dir / ("model" if state.best_step == state.step else "best")
            best_dir = self.out / "best-before"
            if self.ranks.is_first:
                link_folder(source, best_dir)
        return TrainingInputs(
            out=self.out,
            objective=self.pair.objective,
            hyperparameters=self.block.hyperparameters,
            seed=self.spec.seed,
            keep_checkpoints=self.spec.keep_checkpoints,
            recipe=recipe,
            tokenizer=tokenizer,
            num_tokens=num_token_ids(tokenizer),
            train=rows.train,
            valid=rows.valid,
            teacher=teacher,
            signal=self.pair.signal,
            has_one_tokenizer=self.pair.has_one_tokenizer,
            answers_path=answers_path,
            inputs_sha256=rows.inputs_sha256(self.block, self.spec.seed),
            device=self.device,
            resume_dir=resume_dir,
            best_dir=best_dir,
            ranks=self.ranks,
            autocast=self.pair.card.autocast,
            matmul_dtype=self.pair.card.matmul_dtype,
            placement=self.pair.placement,
            rollouts=plan_rollouts(self.spec, rows, num_token_ids(tokenizer), self.sampler_for),
            features=self.pair.features(rows),
            phases=self.phases,
            start=self.spec.start,
        )

    def _test_evaluator_for(
        self, recipe: StudentRecipe, teacher: CachedTeacher | None, open_teachers: ExitStack
    ) -> EvaluatorFor | None:
        """Returns a function that prepares the test rows and returns their evaluator, if any."""
        if self.spec.test_path is None or teacher is None:
            return None

        def prepare(tell: Tell) -> Evaluator:
            """Prepares the test rows. `tell` receives the share that is done."""
            teacher.release()  # frees the teacher: there may be no room for two
            rows = self._preparation().test_rows(lambda share: tell(share / 2))
            test_teacher = self._opened(rows, recipe, None)
            open_teachers.callback(test_teacher.close)
            if test_teacher.is_cached:
                tokens = self.pair.micro_tokens
                test_teacher.fill(ALONE, tokens, lambda done, wanted: tell((1 + done / wanted) / 2))
            return self._evaluators().of(rows, test_teacher, tell)

        return prepare

    def _evaluators(self) -> Evaluators:
        return Evaluators(self.spec, self.pair, self.device, self.sampler_for, self._warn)

    def _check_stop(self, *, step: int = 0) -> None:
        if self.should_stop():
            raise Stopped(step)

    def _warn(self, message: str) -> None:
        self.sink(MessageLine(level="warn", message=message))
