"""Rollouts: answers that the student generates, and that the teacher corrects token by token.

`student`: in a share of the steps, the present student answers the prompts of the batch (GKD,
Agarwal et al., arXiv:2306.13649). `replay`: that share adapts, and old answers are reused
(worker.distill.training.replay).

The choice of steps and the sampling of answers depend on the seed, the step and the training state
alone. So a resumed run repeats them exactly.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from random import Random
from typing import Literal

import torch
from transformers import PreTrainedModel

from app.contracts.batch_plan import BatchPlan, cut_batches
from app.contracts.distillation import Data, Distillation, Phase
from worker.distill.data.batching import Batch, collate
from worker.distill.data.dataset import Rows
from worker.distill.data.rows import Example
from worker.distill.data.sampler import Sampler
from worker.distill.evaluation.held_out import HeldOut
from worker.distill.losses.lm_head import TeacherRows
from worker.distill.teachers.cached_teacher import CachedTeacher
from worker.distill.teachers.signals import Signal
from worker.distill.training.checkpoint import REPLAY, TrainState
from worker.distill.training.replay import Choice, ReplayBuffer, Rollout, choose, next_phi
from worker.errors import UnsupportedModel
from worker.protocol.run_spec import RunSpec

LONGEST_BATCH = 2  # a micro-batch of rollouts has at most this many times batch_tokens

Source = Literal["student", "replay"]


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward pass: rows of the data, or rollouts.

    `rollouts` holds the rollouts as the teacher reads them. It is empty for rows of the data.
    """

    batch: Batch
    rollouts: tuple[Example, ...] = ()

    def teacher_rows(self, teacher: CachedTeacher) -> TeacherRows:
        return teacher.rows_of(self.rollouts) if self.rollouts else teacher.rows(self.batch.indices)


def cut_pieces(rollouts: Sequence[Rollout], batch_tokens: int, device: str) -> list[MicroBatch]:
    """Returns the rollouts as one micro-batch, or as several if their answers are very long."""
    lengths = [rollout.student.num_tokens for rollout in rollouts]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [
        MicroBatch(
            collate([rollout.student for rollout in rollouts], numbers, device),
            tuple(rollouts[i].teacher for i in numbers),
        )
        for numbers in cut_batches(order, lengths, LONGEST_BATCH * batch_tokens)
    ]


def sources_of(block: Distillation) -> set[Source]:
    """Returns the kinds of rollouts that some step of the run may use."""
    then = block.objective.then
    wanted = {block.data.completions, None if then is None else then.completions}
    return {source for source in wanted if source == "student" or source == "replay"}


def check_rollouts(block: Distillation, signal: Signal, *, has_one_tokenizer: bool) -> None:
    """Raises UnsupportedModel if the teacher cannot correct the rollouts that the job requests."""
    for source in sources_of(block):
        instead = 'take completions from "dataset" or "teacher"'
        if not has_one_tokenizer:
            raise UnsupportedModel(
                f"student and teacher have different tokenizers, so the teacher cannot evaluate the student's answers token "
                f'by token (completions "{source}"); {instead}, or use a pair that shares a tokenizer'
            )
        if signal.name != "logits":
            raise UnsupportedModel(
                f'completions "{source}" need the teacher signal logits, but this pair uses {signal.name}; '
                f"{instead}"
            )


@dataclass(frozen=True)
class RolloutPlan:
    """Settings and rows for the generation of rollouts.

    `train` and `teacher_train` are the same rows, as the student and as the teacher reads them. A
    row and its answer have at most `max_tokens`, as for answers by the teacher. `num_tokens` is the
    size of the tokenizer's vocabulary. The LM head may be wider.
    """

    data: Data
    then: Phase | None
    seed: int
    train: Sequence[Example]
    teacher_train: Sequence[Example]
    max_tokens: int
    num_tokens: int
    sampler_for: Callable[[PreTrainedModel], Sampler]

    def source_at(self, share_done: float) -> Source | None:
        """Returns the kind of rollouts in use at this share of the training, if any."""
        wanted = self.data.completions
        if (
            self.then is not None
            and self.then.completions is not None
            and share_done >= self.then.at
        ):
            wanted = self.then.completions
        return wanted if wanted == "student" or wanted == "replay" else None

    def choose(
        self, source: Source, u: float, state: TrainState, total_steps: int, buffer: ReplayBuffer
    ) -> Choice:
        """Returns the source of the present batch, for a random `u` between 0 and 1."""
        if source == "student":
            return "generate" if u < self.data.student_share else "data"
        return choose(u, state.replay_phi, state.step / total_steps, is_full=buffer.is_full)

    def known(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Cuts an answer at the first token id that the tokenizer does not have.

        An untrained student may choose an id from the padding rows of its LM head.
        """
        return tuple(takewhile(lambda token: token < self.num_tokens, tokens))


def plan_rollouts(
    spec: RunSpec, rows: Rows, num_tokens: int, sampler_for: Callable[[PreTrainedModel], Sampler]
) -> RolloutPlan | None:
    """Returns the plan, or None if no step uses rollouts."""
    block = spec.distillation
    if not sources_of(block):
        return None
    return RolloutPlan(
        data=block.data,
        then=block.objective.then,
        seed=spec.seed,
        train=rows.train,
        teacher_train=rows.teacher[: len(rows.train)],
        max_tokens=rows.max_tokens,
        num_tokens=num_tokens,
        sampler_for=sampler_for,
    )


class Rollouts:
    """The rollouts of one training: chooses the steps, generates the answers, and stores them."""

    def __init__(
        self,
        plan: RolloutPlan | None,
        model: PreTrainedModel,
        total_steps: int,
        batches: BatchPlan,
        resume_dir: Path | None = None,
    ) -> None:
        """Without a plan, no step uses rollouts. `resume_dir` restores the replay buffer."""
        self.plan = plan
        self.model = model
        self.total_steps = total_steps
        self.batch_tokens = batches.batch_tokens
        self.micro_tokens = min(batches.batch_tokens, batches.micro_tokens)
        self.buffer = ReplayBuffer(plan.data.replay_capacity if plan else 0)
        self.seconds = 0.0  # duration of the last step's generation
        self._tally = _Tally()
        if resume_dir is not None and (resume_dir / REPLAY).exists():
            self.buffer.load(resume_dir / REPLAY)

    def pieces(
        self,
        state: TrainState,
        numbers: Sequence[int],
        on_progress: Callable[[], None] = lambda: None,
    ) -> list[MicroBatch]:
        """Returns the rollouts of the next step, or none if it learns from rows of the data.

        They are new answers to the prompts of rows `numbers`, or old answers. `on_progress` is
        called during the generation and may raise. The state is then unchanged.
        """
        self.seconds = 0.0
        if (
            self.plan is None
            or (source := self.plan.source_at(state.step / self.total_steps)) is None
        ):
            return []
        random = Random(f"rollouts:{self.plan.seed}:{state.step}")
        rollouts: list[Rollout] = []
        match self.plan.choose(source, random.random(), state, self.total_steps, self.buffer):
            case "generate":
                rollouts = self._generate(self.plan, numbers, state.step, on_progress)
                if source == "replay":
                    self.buffer.add(rollouts)
            case "replay":
                rollouts = self.buffer.sample(random, self.batch_tokens)
        self._tally.count_step(bool(rollouts), self.seconds)
        return cut_pieces(rollouts, self.micro_tokens, str(self.model.device))

    def observe(self, state: TrainState, held_out: HeldOut) -> dict[str, float]:
        """Returns the changes of the state after an evaluation.

        They depend on the cross-entropy, which is comparable across all phases of the objective.
        """
        if self.plan is None or self.plan.source_at(state.step / self.total_steps) != "replay":
            return {}
        loss = held_out.cross_entropy
        return {
            "replay_phi": next_phi(state.replay_phi, state.replay_loss, loss),
            "replay_loss": loss,
        }

    def take_metrics(self, state: TrainState) -> dict[str, float]:
        """Returns the metrics since the last call."""
        if self.plan is None:
            return {}
        tally, self._tally = self._tally, _Tally()
        return tally.metrics() | (
            {"replay_phi": state.replay_phi} if state.replay_loss is not None else {}
        )

    def _generate(
        self, plan: RolloutPlan, numbers: Sequence[int], step: int, on_progress: Callable[[], None]
    ) -> list[Rollout]:
        rows = [(plan.train[i], plan.teacher_train[i]) for i in numbers]
        rooms = [
            plan.max_tokens - max(len(view.answered(()).token_ids) for view in views)
            for views in rows
        ]
        begun = time.monotonic()
        with torch.no_grad():
            made = plan.sampler_for(self.model).generate(
                [student.prompt_ids for student, _ in rows],
                max_new_tokens=max(1, min(plan.data.max_new_tokens, max(rooms))),
                temperature=plan.data.temperature,
                top_p=plan.data.top_p,
                seeds=[Random(f"{plan.seed}:{step}:{i}").getrandbits(31) for i in numbers],
                on_progress=lambda num_done, num_tokens: on_progress(),
            )
        self.seconds = time.monotonic() - begun
        answers = [
            plan.known(one.tokens[: max(1, room)]) for one, room in zip(made, rooms, strict=True)
        ]
        self._tally.count_answers(answers)
        return [
            Rollout(student.answered(tokens), teacher.answered(tokens))
            for (student, teacher), tokens in zip(rows, answers, strict=True)
            if tokens
        ]


class _Tally:
    """Counts of rollouts since the metrics were last taken."""

    def __init__(self) -> None:
        self.num_steps = self.num_on_policy = self.num_rollouts = self.num_tokens = 0
        self.seconds = 0.0

    def count_step(self, is_on_policy: bool, seconds: float) -> None:
        self.num_steps += 1
        self.num_on_policy += is_on_policy
        self.seconds += seconds

    def count_answers(self, answers: Sequence[Sequence[int]]) -> None:
        self.num_rollouts += len(answers)
        self.num_tokens += sum(len(answer) for answer in answers)

    def metrics(self) -> dict[str, float]:
        values = {"on_policy_share": self.num_on_policy / max(1, self.num_steps)}
        values |= {
            "num_rollouts": float(self.num_rollouts),
            "rollout_seconds": round(self.seconds, 3),
        }
        if self.num_rollouts:
            values["rollout_tokens"] = self.num_tokens / self.num_rollouts
        return values
