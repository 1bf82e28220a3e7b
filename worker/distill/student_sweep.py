"""Trains the students of a job one after the other, and selects one.

All students share the rows and the teacher's cached answers. A ladder has one student run per size,
the smallest first. A baseline is one more run: the selected student, trained on the text alone.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.contracts.distillation import Evaluation, Gate
from worker.distill.data.answer_cache import AnswerFile
from worker.distill.decisions import Decision
from worker.distill.evaluation.held_out import size_of
from worker.distill.evaluation.model_selection import LESS_IS_BETTER, choose, passes
from worker.distill.evaluation.report import Evaluator, Tell
from worker.distill.missing_results import MissingPart, attempt
from worker.distill.student_runs import StudentRun
from worker.distill.students.lora import plain_model
from worker.distill.students.recipe import StudentRecipe
from worker.distill.training.checkpoint import TrainState, link_folder
from worker.distill.training.inputs import TrainingInputs
from worker.distill.training.trainer import Stopped, Trainer
from worker.errors import EvaluationFailed, GateFailed
from worker.models.architectures import bare_model, read_config
from worker.protocol.run_lines import (
    MessageLine,
    ProgressLine,
    Sink,
    StageLine,
    StageName,
    Throttle,
)

TAUGHT_PERCENT = 95.0  # progress of the job when every student is trained and evaluated
TEST_READY_PERCENT = 97.0  # progress when the test rows are prepared
JUDGED_PERCENT = 99.0
TRAINING_SHARE = 0.93  # of a student run; the rest is its evaluation

TRAINED = ("num_steps", "num_planned_steps", "best_step", "train_seconds", "stopped_early")

Entry = dict[str, Any]  # Any: open-ended JSON
EvaluatorFor = Callable[[Tell], Evaluator]


@dataclass(frozen=True)
class SelectedStudent:
    """Folder and public result of the selected student. `ladder` has one entry per student."""

    folder: Path
    result: Entry
    ladder: list[Entry]


class StudentSweep:
    """Trains and evaluates the students of a job, and resumes at the run and step in `state`."""

    def __init__(
        self,
        runs: Sequence[StudentRun],
        setup: TrainingInputs,
        state: TrainState,
        *,
        evaluation: Evaluation,
        evaluator_for: EvaluatorFor,
        test_evaluator_for: EvaluatorFor | None = None,
        sink: Sink,
        should_stop: Callable[[], bool],
        trains_from: float,
    ) -> None:
        """Creates a sweep. `setup` is that of the run that is resumed, if there is one.

        `evaluator_for` returns the evaluator of the held-out rows. `test_evaluator_for` returns that of the
        test rows, and is called after the selection. `trains_from` is the job's progress before the
        training, in percent.
        """
        self.runs = runs
        self.setup = setup
        self.state = state
        self.evaluation = evaluation
        self.evaluator = evaluator_for(self._tell_evaluating)
        self._test_evaluator_for = test_evaluator_for
        self.sink = sink
        self.should_stop = should_stop
        self.num_runs = len(runs) + evaluation.ce_baseline
        self.trained_tokens = 0
        self._trains_from = trains_from
        self._span = (trains_from, trains_from)  # progress during an evaluation, in percent
        self._stage: StageName | None = None
        self._throttle = Throttle()
        if setup.resume_dir is not None and setup.ranks.is_first:
            for number, folder in enumerate(self._finished_dirs):
                link_folder(setup.resume_dir / "finished" / str(number), folder)
                self._merge(number)

    def run(self, answers: AnswerFile) -> SelectedStudent:
        """Returns the selected student. Raises GateFailed, EvaluationFailed or training errors."""
        gate = self.evaluation.gate
        if (
            gate is not None
            and gate.metric in ("accuracy", "macro_f1")
            and self.evaluator.labels is None
        ):
            raise GateFailed(
                f"the targets are not labels, so {gate.metric} is undefined; use a gate on rouge_l or kl"
            )
        self._evaluate_again(answers)
        for number in range(len(self.state.finished), len(self.runs)):
            self._take(number, answers)
        entries = self.state.finished
        self.trained_tokens = sum(entry["trained_tokens"] for entry in entries)
        chosen = choose(entries, self.evaluation)
        if chosen is None:
            assert gate is not None
            raise _not_passed(gate, entries)
        result = self._compare(chosen, answers)
        ladder = [{**entry, "chosen": number == chosen} for number, entry in enumerate(entries)]
        tests = result.pop("test_ladder", None)  # None: no test rows were evaluated
        if self._test_evaluator_for is not None:
            result["validation"] = {"student": _figures(entries[chosen])}
        if tests is not None:
            ladder = [{**entry, "test": test} for entry, test in zip(ladder, tests, strict=True)]
        is_tested = tests is not None
        judged = {
            "judged_on": "test" if is_tested else "validation",
            "is_chosen_on_judged_rows": not is_tested,
        }
        trained = {name: entries[chosen][name] for name in TRAINED}
        trained["decisions"] = [
            *(decision.public for decision in self.state.decisions),
            *entries[chosen].get("decisions", []),
        ]
        return SelectedStudent(self._model_dirs[chosen], {**result, **judged, **trained}, ladder)

    def _compare(self, chosen: int, answers: AnswerFile) -> Entry:
        """Returns the report on the selected student. `missing` lists the parts that failed."""
        baseline_dir, missing = None, list(self.state.finished[chosen].get("missing", []))
        if self.evaluation.ce_baseline:
            made = self._train_baseline(chosen)
            if isinstance(made, MissingPart):
                missing.append(self._warn_of(made, "the student is registered without it"))
            else:
                baseline_dir = made
        recipe, folder = self.runs[chosen].recipe, self._model_dirs[chosen]
        if any(entry["part"] == "evaluation" for entry in missing):
            return {**self.evaluator.entries(folder), "missing": missing}

        def evaluator() -> Entry:
            """Evaluates the student on the test rows, or else on the held-out rows."""
            if self._test_evaluator_for is not None:
                return self._test(recipe, chosen, answers, baseline_dir)
            self._enter("evaluating", TAUGHT_PERCENT, JUDGED_PERCENT)
            return self.evaluator.report(recipe, folder, answers, baseline_dir)

        def report() -> Entry:
            """Returns the evaluation, or the entries so far if it failed."""
            result = self._evaluated(evaluator, "the student is registered without the comparison")
            return {**self.evaluator.entries(folder), **result} if "missing" in result else result

        result = self.setup.ranks.from_first(report)
        missing += result.get("missing", [])
        return {**result, "missing": missing} if missing else result

    def _test(
        self, recipe: StudentRecipe, chosen: int, answers: AnswerFile, baseline_dir: Path | None
    ) -> Entry:
        """Returns the report on the test rows. `test_ladder` holds an entry per student."""
        assert self._test_evaluator_for is not None
        self._enter("evaluating", TAUGHT_PERCENT, TEST_READY_PERCENT)
        evaluator = self._test_evaluator_for(self._tell_evaluating)
        folders = self._model_dirs
        percents = [
            TEST_READY_PERCENT + (JUDGED_PERCENT - TEST_READY_PERCENT) * i / (len(folders) + 1)
            for i in range(len(folders) + 2)
        ]
        ladder = []
        for i, folder in enumerate(folders):
            self._enter("evaluating", percents[i], percents[i + 1])
            ladder.append(evaluator.entry(folder, answers))
        self._enter("evaluating", percents[-2], percents[-1])
        result = evaluator.report(recipe, folders[chosen], answers, baseline_dir)
        return {**result, "num_test_rows": len(evaluator.valid_rows), "test_ladder": ladder}

    def _train_baseline(self, chosen: int) -> Path | MissingPart:
        def train() -> Path:
            """Trains the baseline and returns its folder."""
            baseline = replace(self.runs[chosen], is_baseline=True)
            state, folder, _, _ = self._train(len(self.runs), baseline)
            self.trained_tokens += state.trained_tokens
            if not self.setup.ranks.is_first:
                return folder  # only the first rank evaluates
            start_dir = baseline.recipe.start_dir
            return plain_model(folder, start_dir, self.setup.out / "merged" / "baseline")

        # an error must end a job with several ranks, or the others would wait
        if self.setup.ranks.count > 1:
            return train()
        return attempt("ce_baseline", "baseline_failed", train)

    def _evaluate(self, folder: Path, answers: AnswerFile) -> Entry:
        """Returns a student's entry, or its size and the missing part if the evaluation fails."""
        decision = "there is no gate, so the student is registered without its metrics"
        if self.evaluation.gate is not None:
            decision = "the gate counts as not passed"

        def evaluate() -> Entry:
            """Returns the entry, with the student's size in any case."""
            entry = self._evaluated(lambda: self.evaluator.entry(folder, answers), decision)
            return (
                {**size_of(bare_model(read_config(folder))), **entry}
                if "missing" in entry
                else entry
            )

        return self.setup.ranks.from_first(evaluate)

    def _evaluate_again(self, answers: AnswerFile) -> None:
        """Repeats the evaluations that failed before the job was resumed."""
        finished = list(self.state.finished)
        for number, (entry, folder) in enumerate(zip(finished, self._model_dirs, strict=True)):
            if "missing" in entry:
                names = (*TRAINED, "label", "trained_tokens", "decisions")
                kept = {name: entry[name] for name in names if name in entry}
                evaluation = self._evaluate(folder, answers)
                finished[number] = {
                    **evaluation,
                    **kept,
                    "passed": passes(self.evaluation.gate, evaluation),
                }
        self.state = self.state.model_copy(update={"finished": tuple(finished)})

    def _evaluated(self, evaluate: Callable[[], Entry], decision: str) -> Entry:
        """Returns the evaluation. If it fails, warns and returns an entry with the missing part."""
        with self.setup.phases.phase("evaluation"):
            evaluation = attempt("evaluation", EvaluationFailed.code, evaluate)
        if not isinstance(evaluation, MissingPart):
            return evaluation
        return {"missing": [self._warn_of(evaluation, decision)]}

    def _warn_of(self, missing: MissingPart, decision: str) -> Entry:
        self.sink(missing.event(decision))
        return missing.model_dump()

    @property
    def _finished_dirs(self) -> tuple[Path, ...]:
        return tuple(
            self.setup.out / "finished" / str(number) for number in range(len(self.state.finished))
        )

    @property
    def _model_dirs(self) -> tuple[Path, ...]:
        """Folders with the plain models of the finished students."""
        return tuple(self._model_dir(number) for number in range(len(self.state.finished)))

    def _model_dir(self, number: int) -> Path:
        merged = self.setup.out / "merged" / str(number)
        return merged if merged.exists() else self.setup.out / "finished" / str(number)

    def _merge(self, number: int) -> None:
        """Merges the adapters of a finished student, if it has any."""
        start_dir, out = self.runs[number].recipe.start_dir, self.setup.out
        plain_model(out / "finished" / str(number), start_dir, out / "merged" / str(number))

    def _take(self, number: int, answers: AnswerFile) -> None:
        """Trains and evaluates one student, and moves the state to the next run."""
        run = self.runs[number]
        state, best_dir, num_planned, decisions = self._train(number, run)
        folder = self.setup.out / "finished" / str(number)
        middle = self._percent(number, TRAINING_SHARE)
        self._enter("evaluating", middle, self._percent(number, 1.0))

        if self.setup.ranks.is_first:
            link_folder(best_dir, folder)  # must outlive its checkpoint
            self._merge(number)
        entry = self._evaluate(self._model_dir(number), answers)
        entry = {
            "label": run.label,
            **entry,
            "passed": passes(self.evaluation.gate, entry),
            "num_steps": state.step,
            "num_planned_steps": num_planned,
            "best_step": state.first_step + (state.best_step or 0),
            "train_seconds": round(state.trained_seconds, 1),
            "stopped_early": state.is_done,
            "trained_tokens": state.trained_tokens,
            "decisions": [decision.public for decision in decisions],
        }
        self.state = TrainState(
            first_step=state.first_step + num_planned + 1,
            num_threads=state.num_threads,
            num_processes=state.num_processes,
            precision=state.precision,
            batch_tokens=state.batch_tokens,
            inputs_sha256=state.inputs_sha256,
            finished=(*state.finished, entry),
            kept_layers=state.kept_layers,
            defaults_version=state.defaults_version,
            decisions=state.decisions,
        )
        self.setup = replace(self.setup, resume_dir=None, best_dir=None)

    def _train(self, number: int, run: StudentRun) -> tuple[TrainState, Path, int, list[Decision]]:
        """Returns the final state, the best student's folder, the number of planned steps, and the
        values that the job left to the service.
        """
        self._enter("training", 0.0, 0.0)
        if self.num_runs > 1:
            self.sink(MessageLine(message=f"training {run.name} ({number + 1} of {self.num_runs})"))
        setup = replace(
            run.setup(self.setup),
            finished_dirs=self._finished_dirs,
            num_runs_after=self.num_runs - number - 1,
        )
        with self.setup.phases.phase("training"):
            trainer = Trainer(
                setup,
                self.state,
                self.sink,
                self.should_stop,
                report=lambda share: self._percent(number, TRAINING_SHARE * share),
            )
            self.state, best_dir = trainer.run()
        num_planned, decisions = trainer.total_steps, [*run.decisions, *trainer.decisions]
        del trainer
        gc.collect()  # modules form reference cycles, and the evaluation needs the memory
        return self.state, best_dir, num_planned, decisions

    def _enter(self, stage: StageName, percent: float, until: float) -> None:
        self._span = (percent, until)
        if stage != self._stage:
            self._stage = stage
            self.sink(StageLine(name=stage))

    def _percent(self, number: int, share: float) -> float:
        """Returns the job's progress when `share` of run `number` is done, in percent."""
        done = (number + share) / self.num_runs
        return round(self._trains_from + (TAUGHT_PERCENT - self._trains_from) * done, 1)

    def _tell_evaluating(self, share: float) -> None:
        if self.should_stop():
            raise Stopped(self.state.job_step)
        if self._throttle.is_due():
            percent, until = self._span
            percent = round(percent + (until - percent) * share, 1)
            self.sink(ProgressLine(percent=percent, step=self.state.job_step))


def _figures(entry: Entry) -> Entry:
    """Returns the metrics of a finished student's entry."""
    others = {"label", "passed", "trained_tokens", "missing", "decisions", *TRAINED}
    return {name: value for name, value in entry.items() if name not in others}


def _not_passed(gate: Gate, entries: Sequence[Entry]) -> GateFailed | EvaluationFailed:
    """Returns the error for a job in which no student is known to pass."""
    failed = [entry for entry in entries if "missing" in entry]
    if not failed:
        return GateFailed(_why(gate, entries))
    labels, message = (
        ", ".join(entry["label"] for entry in failed),
        failed[0]["missing"][0]["message"],
    )
    return EvaluationFailed(
        f"the evaluation failed ({labels}; {message}), so the gate on {gate.metric} could not be checked and no student "
        "is registered; the checkpoints are kept: fix the cause, then resume the job"
    )


def _why(gate: Gate, entries: Sequence[Entry]) -> str:
    """Explains why no student passes, and what to change."""
    sign, bound = (
        ("at least", gate.at_least) if gate.at_least is not None else ("at most", gate.at_most)
    )
    measured = [(entry[gate.metric], entry["label"]) for entry in entries if gate.metric in entry]
    if not measured:
        return f"the metric of the gate, {gate.metric}, could not be measured; use a gate on another metric"
    value, label = (min if gate.metric in LESS_IS_BETTER else max)(measured)
    return (
        f"no student passes the gate: {gate.metric} must be {sign} {bound:g}, but the best is {value:.4g} ({label}); "
        "train for more epochs, use a larger student, or relax the gate (the last checkpoint is kept)"
    )
