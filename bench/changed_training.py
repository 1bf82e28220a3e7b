"""A training with a change that no option of a job offers: `python -m bench.changed_training SPEC --out FOLDER`.

`bench.recipes` runs it to compare values that are constants of the trainer. Runs with the same student, rows and
seed share the fitted layers in the folder `--fits`, so that each of them spends its time on the steps.

    {"betas": [0.9, 0.99], "schedule": "linear", "averages": [0.9, 0.97]}

`averages` are decays of exponential moving averages of the weights. They are judged on the held-out rows after the
last step, beside the last weights, and written to `averages.json`.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import worker.train
from worker.distill import student_sweep
from worker.distill.data.rows import Example
from worker.distill.students.recipe import StudentRecipe
from worker.distill.training import trainer
from worker.distill.training.devices import ON_CPU, Placement
from worker.distill.training.layer_fitting import Fit, fit_student
from worker.distill.training.rollouts import MicroBatch

Json = dict[str, Any]  # Any: JSON
DECAY_SHARE = 0.3  # of the steps, for the schedule "wsd"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.changed_training", description=__doc__)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--change", type=json.loads, default={})
    parser.add_argument("--fits", type=Path, help="folder of fitted layers")
    arguments = parser.parse_args()
    apply(arguments.change, arguments.out)
    if arguments.fits is not None:
        trainer.fit_student = stored_fits(arguments.fits, arguments.spec)  # type: ignore[attr-defined]
    sys.argv = [sys.argv[0], str(arguments.spec), "--out", str(arguments.out)]
    return worker.train.main()


def apply(change: Json, out: Path) -> None:
    """Changes the trainer of this process."""
    if "schedule" in change:
        trainer.scheduled = SCHEDULES[change["schedule"]]  # type: ignore[attr-defined]

    class ChangedTrainer(trainer.Trainer):
        """The trainer with other betas, and with averages of the weights."""

        averages: dict[float, list[Tensor]] = {}

        def _make_optimizer(self, weight_decay: float) -> torch.optim.AdamW:
            optimizer = super()._make_optimizer(weight_decay)
            for group in optimizer.param_groups:
                group["betas"] = tuple(change.get("betas", group["betas"]))
            return optimizer

        def _step(self, pieces: list[MicroBatch]) -> None:
            super()._step(pieces)
            weights = [p.detach() for p in self._trained_parameters()]
            for decay in change.get("averages", ()):
                if self.state.step == 1:
                    self.averages[decay] = [w.clone() for w in weights]
                torch._foreach_lerp_(self.averages[decay], weights, 1 - decay)
            if self.averages and self.state.step == self.total_steps:
                self._judge_averages(weights)

        def _judge_averages(self, weights: list[Tensor]) -> None:
            last = [w.clone() for w in weights]
            found = {}
            for decay, average in self.averages.items():
                torch._foreach_copy_(weights, average)
                held_out = self.measure()
                found[decay] = {"kl": held_out.kl, "agreement": held_out.agreement}
            torch._foreach_copy_(weights, last)
            (out / "averages.json").write_text(json.dumps(found))

    student_sweep.Trainer = ChangedTrainer  # type: ignore[attr-defined]


def linear(step: int, total_steps: int, *, peak: float, warmup: float) -> float:
    """A linear warm-up, then a linear decay to zero."""
    num_warmup = math.ceil(warmup * total_steps)
    if step < num_warmup:
        return peak * (step + 1) / (num_warmup + 1)
    return peak * (total_steps - step) / max(1, total_steps - num_warmup)


def warmup_stable_decay(step: int, total_steps: int, *, peak: float, warmup: float) -> float:
    """A linear warm-up, a constant rate, then a linear decay to zero."""
    num_warmup = math.ceil(warmup * total_steps)
    if step < num_warmup:
        return peak * (step + 1) / (num_warmup + 1)
    return peak * min(1.0, (total_steps - step) / (DECAY_SHARE * total_steps))


SCHEDULES: dict[str, Callable[..., float]] = {"linear": linear, "wsd": warmup_stable_decay}


def stored_fits(folder: Path, spec: Path) -> Callable[..., Fit]:
    """Returns a `fit_student` that keeps the fitted weights in a folder, and reads them if they are there."""

    def fit(
        model: PreTrainedModel,
        recipe: StudentRecipe,
        rows: Sequence[Example],
        matmul_dtype: torch.dtype,
        on_progress: Callable[[], None],
        *,
        placement: Placement = ON_CPU,
    ) -> Fit:
        tokens = [row.token_ids for row in rows]
        told = repr(
            (
                recipe.start_dir,
                recipe.layers,
                recipe.student,
                recipe.fits_layers,
                matmul_dtype,
                tokens,
            )
        )
        path = folder / f"{hashlib.sha256(told.encode()).hexdigest()[:16]}.safetensors"
        if path.exists():
            stored = load_file(path)
            num_layers = int(stored.pop("num_layers"))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(stored[name])
            return Fit(num_layers, num_rows=0)
        made = fit_student(model, recipe, rows, matmul_dtype, on_progress, placement=placement)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
        save_file({**weights, "num_layers": torch.tensor(made.num_layers)}, path)
        return made

    return fit


if __name__ == "__main__":
    sys.exit(main())
