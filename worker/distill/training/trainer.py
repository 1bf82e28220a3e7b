"""The training loop of one student, with evaluation, early stopping and checkpoints.

A step collates a batch, reads the teacher's rows, runs the student, and updates its weights by the
fused loss.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from app.contracts.batch_plan import BatchPlan, batch_tokens_of, eval_steps_of
from app.contracts.distillation import Hyperparameters
from worker.distill.data.batching import collate
from worker.distill.decisions import Decision
from worker.distill.evaluation.held_out import HeldOut, HeldOutRows, stopping_score
from worker.distill.losses.divergences import TokenObjective
from worker.distill.losses.lm_head import head_of
from worker.distill.students.lora import adapter_format
from worker.distill.students.recipe import load_student
from worker.distill.training.automatic_values import decide_for_student, peak_learning_rate
from worker.distill.training.checkpoint import (
    Snapshot,
    TrainState,
    load_optimizer,
    prune_checkpoints,
    save_checkpoint,
)
from worker.distill.training.feature_losses import Features
from worker.distill.training.inputs import TrainingInputs
from worker.distill.training.layer_fitting import fit_student
from worker.distill.training.lr_schedule import parameter_groups, scheduled
from worker.distill.training.rollouts import MicroBatch, Rollouts
from worker.distill.training.step_gradients import Gradients, StepStats, clipped_step
from worker.distill.training.throughput import MetricAverager, Throughput
from worker.errors import NanLoss
from worker.protocol.run_lines import (
    CheckpointLine,
    MessageLine,
    MetricsLine,
    ProgressLine,
    Sink,
    Throttle,
)

CHECKPOINT_SECONDS = 600.0  # seconds; with checkpoint_steps "auto", no more work than this is lost
METRIC_POINTS = 500  # approximate points per metric of a long run


class Stopped(Exception):  # not an error, so its name has no such suffix
    """The run was asked to stop. Everything worth keeping is on disk."""

    @property
    def step(self) -> int:
        return int(self.args[0])


@dataclass(frozen=True)
class UnreadStep:
    """A step whose figures the host has not read. `more` has metrics if they are reported."""

    job_step: int
    stats: StepStats
    more: dict[str, float] | None


class Trainer:
    """Training of one student. `state` is its progress."""

    def __init__(
        self,
        setup: TrainingInputs,
        state: TrainState,
        sink: Sink,
        should_stop: Callable[[], bool],
        report: Callable[[float], float],
    ) -> None:
        """`report` converts the share of this training that is done into percent of the job."""
        self.setup = setup
        self.state = state
        self.sink = sink
        self.should_stop = should_stop
        self.report = report
        h = setup.hyperparameters
        self._plan_batches(h)
        self.best_dir = setup.best_dir
        model = load_student(
            setup.recipe,
            setup.resume_dir,
            seed=setup.seed,
            matmul_dtype=setup.matmul_dtype,
            has_checkpointing=setup.placement.has_checkpointing,
            frozen_dtype=setup.autocast or torch.float32,
        )
        self.model = model.to(setup.device)
        self.head = replace(head_of(self.model, setup.num_tokens), body_dtype=setup.matmul_dtype)
        self.features = Features(setup.features, self.model) if setup.features else None
        self.gradients = Gradients(
            self.model,
            self.head,
            setup.teacher if setup.signal.has_distribution else None,
            self.features,
            setup.autocast,
            setup.ranks,
        )
        self.optimizer = self._make_optimizer(h.weight_decay)
        torch.manual_seed(setup.seed)
        if setup.resume_dir is not None:
            load_optimizer(setup.resume_dir, self.optimizer, self.model, self._projections)
        # rollouts need the teacher's distribution to learn from
        plan = setup.rollouts if setup.signal.has_distribution else None
        self.rollouts = Rollouts(plan, self.model, self.total_steps, self.plan, setup.resume_dir)
        self._saved_step = state.step if setup.resume_dir is not None else 0
        self._saved_at = time.monotonic()
        self._evaluated_step: int | None = None  # the step that `state.metrics` belongs to
        # one more than the number of steps, so that no two values of a metric share a step
        num_steps = self.total_steps + setup.num_runs_after * (self.total_steps + 1)
        self.num_job_steps = state.first_step + num_steps
        self._pace = Throughput(state, num_steps)
        self._means, self._train_metrics = MetricAverager(), dict[str, float]()
        self._unread: deque[UnreadStep] = deque()
        self._throttle = Throttle()

    def _plan_batches(self, h: Hyperparameters) -> None:
        setup = self.setup
        lengths = [example.num_tokens for example in setup.train]
        self.plan = BatchPlan(
            lengths,
            batch_tokens=self.state.batch_tokens or batch_tokens_of(h),
            seed=setup.seed,
            batch_rows=h.batch_rows,
            micro_tokens=setup.placement.micro_tokens,
        )
        self.total_steps = self.plan.num_steps(h.n_epochs, at_most=h.max_steps)
        self.valid = HeldOutRows(
            setup.valid,
            first_index=len(setup.train),
            batch_tokens=batch_tokens_of(h),  # equal in all ranks: they share the batches
            device=setup.device,
            autocast=setup.autocast,
            ranks=setup.ranks,
        )
        num_held_out = sum(example.num_tokens for example in self.setup.valid)
        self.eval_steps = eval_steps_of(h, self.plan, self.total_steps, num_held_out)
        asked = h.checkpoint_steps
        self.checkpoint_steps = self.eval_steps if asked == "auto" else asked

    def _make_optimizer(self, weight_decay: float) -> torch.optim.AdamW:
        groups = parameter_groups(self.model, weight_decay)
        if self._projections is not None:
            groups.append({"params": list(self._projections.parameters()), "weight_decay": 0.0})
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)

    @property
    def decisions(self) -> list[Decision]:
        """The values of this training that the job leaves to the service."""
        setup, steps = self.setup, {"eval_steps": self.eval_steps, "total_steps": self.total_steps}
        h = setup.hyperparameters
        return [*decide_for_student(h, setup.recipe, self.model, self.state, **steps)]

    def run(self) -> tuple[TrainState, Path]:
        """Trains until the last step or early stopping, and returns the best student's folder.

        Raises Stopped, NanLoss or DiskFull.
        """
        if self.setup.resume_dir is None:
            self.fit()
            for decision in self.decisions:
                self.sink(decision.event())
        if not self.state.untrained_metrics:
            held_out = self.measure()
            self._update(
                untrained_metrics=held_out.series(), **self.rollouts.observe(self.state, held_out)
            )
            self._tell_metrics(self.state.untrained_metrics)
        while self.state.step < self.total_steps and not self.state.is_done:
            self._stop_if_asked()
            self._step(self._next_pieces())
            is_last = self.state.step == self.total_steps
            if is_last or self.state.step % self.eval_steps == 0:
                self._evaluate()
            self._checkpoint_if_due(is_last=is_last or self.state.is_done)
        if self.rollouts.plan and self.setup.teacher is not None:
            self.setup.teacher.release()  # no more rollouts need it
        assert self.best_dir is not None  # the last step is evaluated, so there is a best one
        return self.state, self.best_dir

    def fit(self) -> None:
        """Fits the layers of a student that lost some, before its first step."""
        # the epoch's last batches first, because a short training never sees those
        order = chain.from_iterable(reversed(self.plan.epoch(0)))
        rows = [self.setup.train[number] for number in order]
        with self.setup.phases.phase("layer_fit"):
            fit = fit_student(
                self.model,
                self.setup.recipe,
                rows,
                self.setup.matmul_dtype,
                self._while_working,
                placement=self.setup.placement,
            )
        self._update(num_fitted_layers=fit.num_layers)
        if fit.message:
            self.sink(MessageLine(message=fit.message))

    def measure(self) -> HeldOut:
        """Evaluates the present student on the held-out rows."""
        teacher = self.setup.teacher if self.setup.has_one_tokenizer else None
        with self.setup.phases.phase("evaluation"):
            return self.valid.measure(
                self.model, self.head, teacher, self._objective(), on_batch=self._tell
            )

    def _next_pieces(self) -> list[MicroBatch]:
        numbers = self.plan.epoch(self.state.epoch)[self.state.batch]
        own = self.rollouts.pieces(self.state, numbers, self._while_working)
        numbers = self.setup.ranks.share(numbers, self.plan.lengths)
        return own or [
            MicroBatch(collate(self.setup.train, piece, self.setup.device))
            for piece in self.plan.pieces(numbers)
        ]

    def _while_working(self) -> None:
        self._stop_if_asked()
        self._tell()

    def _objective(self) -> TokenObjective:
        objective = self.setup.objective
        then = objective.then
        is_second = then is not None and self.state.step >= then.at * self.total_steps
        share = self.state.step / max(1, self.total_steps)
        return TokenObjective.from_objective(objective, then if is_second else None, share)

    def _step(self, pieces: list[MicroBatch]) -> None:
        h = self.setup.hyperparameters
        peak = peak_learning_rate(h, self.setup.recipe, self.model, self.state)
        rate = scheduled(self.state.step, self.total_steps, peak=peak, warmup=h.warmup_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        stats = self.gradients.add(pieces, self._objective(), self._trained_parameters())
        clipped_step(self.optimizer, stats, h.max_grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        num_batches = len(self.plan.epoch(self.state.epoch))
        is_border = self.state.batch + 1 == num_batches
        self._update(
            step=self.state.step + 1,
            epoch=self.state.epoch + is_border,
            batch=0 if is_border else self.state.batch + 1,
            trained_tokens=self.state.trained_tokens + stats.num_tokens,
        )
        self._pace.count(stats.num_tokens, seconds_left_out=self.rollouts.seconds)
        more = None
        if self.state.step % max(1, self.total_steps // METRIC_POINTS) == 0:
            more = {"learning_rate": rate, **self.rollouts.take_metrics(self.state)}
        self._unread.append(UnreadStep(self.state.job_step, stats, more))
        self._read_steps(num_left=0 if self.setup.device == "cpu" else 1)
        self._tell()

    def _read_steps(self, *, num_left: int = 0) -> None:
        """Reads the figures of all steps but the newest `num_left`, and reports them.

        The host prepares the next step while a GPU computes the last one, so it reads late.
        """
        while len(self._unread) > num_left:
            step = self._unread.popleft()
            values, norm = step.stats.read()
            loss = values["loss_sum"] / step.stats.num_targets
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NanLoss(
                    f"loss {loss} with gradient norm {norm} at step {step.job_step - 1}; lower the learning rate, or start "
                    "with forward_kl (the last checkpoint is usable)"
                )
            self._means.add(step.stats.num_targets, **values)
            if step.more is not None:
                self._train_metrics = self._means.take()
                values = {**self._train_metrics, "grad_norm": norm, **step.more}
                self._tell_metrics(values, step.job_step)

    @property
    def _projections(self) -> nn.Module | None:
        return self.features.projections if self.features else None

    def _trained_parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _evaluate(self) -> None:
        self._read_steps()
        held_out = self.measure()
        values = held_out.series()
        self._update(**self.rollouts.observe(self.state, held_out))
        self._tell_metrics(values)
        self._evaluated_step = self.state.step
        early = self.setup.hyperparameters.early_stopping
        score = stopping_score(held_out, early, self.setup.signal)
        if not math.isfinite(score):
            raise NanLoss(
                f"the held-out score is {score} at step {self.state.job_step}; lower the learning rate"
            )
        best = self.state.best_score
        if best is None or score < best:
            self._update(
                best_score=score,
                best_step=self.state.step,
                best_metrics=values,
                num_bad_evals=0,
                metrics=values,
            )
            return
        num_bad_evals = self.state.num_bad_evals + 1
        is_done = early is not None and num_bad_evals >= early.patience
        self._update(num_bad_evals=num_bad_evals, is_done=is_done, metrics=values)

    def _checkpoint_if_due(self, *, is_last: bool) -> None:
        is_best = self.state.best_step == self.state.step
        is_auto = self.setup.hyperparameters.checkpoint_steps == "auto"
        is_late = is_auto and time.monotonic() - self._saved_at > CHECKPOINT_SECONDS
        if is_last or is_best or is_late or self.state.step % self.checkpoint_steps == 0:
            self._checkpoint()

    def _checkpoint(self) -> None:
        step = self.state.step
        if step == self._saved_step:
            return
        self._read_steps()
        self._update(trained_seconds=self._pace.seconds)
        is_best = self.state.best_step == step
        setup = self.setup
        snapshot = Snapshot(
            state=self.state,
            model=self.model,
            tokenizer=setup.tokenizer,
            optimizer=self.optimizer,
            best_dir=None if is_best else self.best_dir,
            answers_path=setup.answers_path,
            replay_jsonl=self.rollouts.buffer.to_jsonl(),
            projections=self._projections,
            finished_dirs=setup.finished_dirs,
            adapters=adapter_format(self.model, setup.recipe.lora, setup.adapter_base),
        )
        job_step, best_step = self.state.job_step, self.state.best_step
        is_first = setup.ranks.is_first
        folder = setup.out / f"step-{job_step}"
        if is_first:
            with setup.phases.phase("saving"):
                save_checkpoint(setup.out, snapshot)
        if is_best:
            self.best_dir = folder / "model"
        elif self.best_dir is not None:
            self.best_dir = folder / "best"
        self._saved_step, self._saved_at = step, time.monotonic()
        keep_step = None if best_step is None else self.state.first_step + best_step
        if is_first:
            prune_checkpoints(setup.out, keep_newest=setup.keep_checkpoints, keep_step=keep_step)
        metrics = self._train_metrics | (self.state.metrics if self._evaluated_step == step else {})
        line = CheckpointLine(step=job_step, folder=folder.name, is_best=is_best, metrics=metrics)
        self.sink(line)

    def _tell_metrics(self, values: dict[str, float], job_step: int | None = None) -> None:
        step = self.state.job_step if job_step is None else job_step
        self.sink(MetricsLine(step=step, total_steps=self.num_job_steps, values=values))

    def _stop_if_asked(self) -> None:
        if self.setup.ranks.any(self.should_stop()):
            self._checkpoint()
            raise Stopped(self.state.job_step)

    def _update(self, **changes: object) -> None:
        self.state = self.state.model_copy(update=changes)

    def _tell(self) -> None:
        if not self._throttle.is_due():
            return
        done = self.state.step / self.total_steps
        self.sink(
            ProgressLine(
                percent=self.report(done),
                step=self.state.job_step,
                total_steps=self.num_job_steps,
                epoch=round(
                    self.state.epoch + self.state.batch / len(self.plan.epoch(self.state.epoch)), 3
                ),
                tokens_per_second=self._pace.tokens_per_second,
                seconds_remaining=self._pace.seconds_remaining,
            )
        )
