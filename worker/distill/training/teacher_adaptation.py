"""Fine-tunes a masked teacher on the job's rows by conditional masked language modelling.

Some targets of a row are masked, and the model learns to predict them from the source and from both
sides. The share of masked targets is the same as in labelling. The adapted model is kept on disk
under a hash of all its inputs.

Source: Chen et al., arXiv:1911.03829.

B batch, T tokens, N masked targets of a batch, H hidden width.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import mkdtemp

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from app.contracts.batch_plan import BatchPlan
from app.contracts.distillation import Auto
from worker.cpu import prepare_for_training
from worker.distill.data.batching import flat_positions, pad
from worker.distill.data.rows import Example
from worker.distill.forward.hidden_states import autocast, select, transform_of
from worker.distill.losses.divergences import TokenObjective
from worker.distill.losses.fused_loss import fused_distillation_loss
from worker.distill.losses.lm_head import head_of
from worker.distill.students.recipe import load_model
from worker.distill.teachers.masked_lm import NUM_PASSES, segments
from worker.distill.training.lr_schedule import parameter_groups, scheduled
from worker.host_copies import to_device

MAX_AUTO_STEPS = 300  # "auto" is one pass over the rows, with at most this many steps
LEARNING_RATE = 5e-5  # usual for the fine-tuning of BERT
WARMUP_RATIO = 0.1
NUM_KEPT = 4  # number of adapted teachers on disk, the most recently used ones


@dataclass(frozen=True)
class Adaptation:
    """Inputs of a teacher adaptation. `identity` identifies the original weights.

    `rows` are the training rows as the teacher reads them. The weights are float32, and the layers
    run under `autocast` if it is given.
    """

    teacher_dir: Path
    identity: str
    mask_id: int
    rows: Sequence[Example]
    steps: int | Auto
    batch_tokens: int
    seed: int
    device: str
    autocast: torch.dtype | None = None

    @property
    def plan(self) -> BatchPlan:
        return BatchPlan(
            [row.num_tokens for row in self.rows], batch_tokens=self.batch_tokens, seed=self.seed
        )

    @property
    def num_steps(self) -> int:
        return min(len(self.plan.epoch(0)), MAX_AUTO_STEPS) if self.steps == "auto" else self.steps

    @property
    def key(self) -> str:
        """Hash of everything that determines the weights.

        It includes threads and device, because they change the order of sums.
        """
        settings = [
            self.identity,
            self.mask_id,
            self.num_steps,
            self.batch_tokens,
            self.seed,
            self.device,
        ]
        settings += [LEARNING_RATE, WARMUP_RATIO, NUM_PASSES, torch.get_num_threads()]
        if self.autocast is not None:
            settings.append(str(self.autocast))
        rows = [[row.token_ids, row.spans] for row in self.rows]
        return hashlib.sha256(json.dumps([settings, rows]).encode()).hexdigest()


def adapt(adaptation: Adaptation, folder: Path, on_step: Callable[[int, int], None]) -> Path:
    """Returns the folder of the adapted teacher within `folder`. An earlier job's result is reused.

    `on_step` receives the steps done and planned, and may raise to stop. Nothing is kept then.
    """
    target = folder / adaptation.key[:32]
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(mkdtemp(dir=folder, prefix="."))
        try:
            adapted_model(adaptation, on_step).save_pretrained(partial)
            _publish(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    target.touch()  # pruning keeps the latest modification times
    kept = sorted((path for path in folder.iterdir() if path.name[0] != "."), key=_modified_at)
    for old in kept[:-NUM_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _modified_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another run has pruned it since it was listed
        return 0.0


def _publish(partial: Path, target: Path) -> None:
    try:
        partial.rename(target)
    except OSError:  # another run published the same bits first
        if not target.exists():
            raise


def adapted_model(adaptation: Adaptation, on_step: Callable[[int, int], None]) -> PreTrainedModel:
    """Returns the teacher after its steps of AdamW, with the same bits each time."""
    model = load_model(adaptation.teacher_dir).to(adaptation.device)
    prepare_for_training(model, fuses_layers=False)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=0.0, fused=True)
    plan, num_steps, step, epoch = adaptation.plan, adaptation.num_steps, 0, 0
    while step < num_steps:
        for numbers in plan.epoch(epoch)[: num_steps - step]:
            on_step(step, num_steps)
            random = Random(f"{adaptation.seed}:{step}")
            rows = [adaptation.rows[i] for i in numbers]
            loss = masked_loss(
                model, rows, adaptation.mask_id, random, autocast_dtype=adaptation.autocast
            )
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = scheduled(step, num_steps, peak=LEARNING_RATE, warmup=WARMUP_RATIO)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
        epoch += 1
    return model


def masked_loss(
    model: PreTrainedModel,
    rows: Sequence[Example],
    mask_id: int,
    random: Random,
    *,
    autocast_dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns the mean cross-entropy of the masked targets.

    A share of 1 / NUM_PASSES of each row's targets is masked, and at least one. The targets are
    chosen and masked on the CPU, so that the host need not wait for a GPU.
    """
    ids_BT, mask_BT = pad([row.token_ids for row in rows])
    hidden = [
        sorted(random.sample(row.target_positions, max(1, round(row.num_targets / NUM_PASSES))))
        for row in rows
    ]
    positions_N = flat_positions(hidden, ids_BT.shape[1])
    targets_N = ids_BT.flatten()[positions_N]
    ids_BT.view(-1)[positions_N] = mask_id
    ids_BT, mask_BT, positions_N, targets_N = (
        to_device(tensor, model.device) for tensor in (ids_BT, mask_BT, positions_N, targets_N)
    )
    with autocast(model.device.type, autocast_dtype):
        states_BTH = model.base_model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            **segments(model, rows, ids_BT.shape[1]),
        ).last_hidden_state
        hidden_NH = transform_of(model)(select(states_BTH, positions_N))
    head = head_of(model)
    loss, _ = fused_distillation_loss(
        hidden_NH.to(head.weight_VH.dtype),
        head,
        targets_N,
        None,
        TokenObjective(),
        denominator=len(targets_N),
    )
    return loss
