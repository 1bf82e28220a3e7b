"""A masked teacher adapted to rows with a pattern: it learns it, with the same bits each time, and once."""

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import save_tiny
from worker.distill.data.rows import Example
from worker.distill.students.recipe import load_model
from worker.distill.training.teacher_adaptation import Adaptation, adapt, masked_loss

MASK = 4


def row(random: Random) -> Example:
    """The answer says the prompt again, a token higher."""
    prompt = [random.randrange(20, 40) for _ in range(6)]
    return Example((2, *prompt, 3, *(token + 1 for token in prompt), 3), ((8, 15),))


@pytest.fixture
def adaptation(tiny_bert_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Adaptation:
    # so tiny a model wants more
    monkeypatch.setattr("worker.distill.training.teacher_adaptation.LEARNING_RATE", 3e-3)
    random = Random(0)
    return Adaptation(
        teacher_dir=tiny_bert_dir,
        identity="tiny",
        mask_id=MASK,
        rows=[row(random) for _ in range(200)],
        steps=40,
        batch_tokens=512,
        seed=0,
        device="cpu",
    )


def silent(step: int, num_steps: int) -> None:
    """Nobody is told."""


def held_out_loss(folder: Path) -> float:
    random = Random(1)
    with torch.no_grad():
        return float(
            masked_loss(load_model(folder), [row(random) for _ in range(50)], MASK, random)
        )


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_adaptation_lowers_the_loss_on_rows_that_it_has_not_seen(
    adaptation: Adaptation, family: str, tmp_path: Path
) -> None:
    start = save_tiny(tmp_path / family, family, num_layers=2)
    adapted = adapt(replace(adaptation, teacher_dir=start), tmp_path / "adapted", silent)
    assert held_out_loss(adapted) < 0.7 * held_out_loss(start)


def test_adaptation_has_the_same_bits_twice_and_others_with_another_seed(
    adaptation: Adaptation, tmp_path: Path
) -> None:
    short = replace(adaptation, steps=2)
    one, other, seeded = (
        load_file(adapt(job, tmp_path / name, silent) / "model.safetensors")
        for name, job in (("one", short), ("other", short), ("seeded", replace(short, seed=1)))
    )
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert any(not torch.equal(tensor, seeded[name]) for name, tensor in one.items())


def test_an_adapted_teacher_is_taken_from_disk(adaptation: Adaptation, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    short = replace(adaptation, steps=2)
    folders = [
        adapt(short, tmp_path, lambda step, num_steps: told.append((step, num_steps)))
        for _ in range(2)
    ]
    assert folders[0] == folders[1]
    assert told == [(0, 2), (1, 2)]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"steps": 3}, {"identity": "other"}, {"rows": (), "steps": 2}], ids=str
)
def test_whatever_changes_the_weights_changes_their_name(
    adaptation: Adaptation, change: dict[str, Any]
) -> None:
    short = replace(adaptation, steps=2)
    assert replace(short, **change).key != short.key


def test_a_stop_leaves_nothing_behind(adaptation: Adaptation, tmp_path: Path) -> None:
    def stop(step: int, num_steps: int) -> None:
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapt(adaptation, tmp_path, stop)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_disappears_while_old_ones_are_pruned_stops_no_run(
    adaptation: Adaptation, tmp_path: Path
) -> None:
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")  # listed, and stat() does not find it
    assert adapt(adaptation, tmp_path, silent).exists()


def test_only_the_latest_adapted_teachers_are_kept(adaptation: Adaptation, tmp_path: Path) -> None:
    folders = [
        adapt(replace(adaptation, steps=1, seed=seed), tmp_path, silent) for seed in range(6)
    ]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folders[2:]}


@pytest.mark.parametrize(("batch_tokens", "num_steps"), [(512, 6), (16, 200)])
def test_auto_is_one_pass_over_the_rows(
    adaptation: Adaptation, batch_tokens: int, num_steps: int
) -> None:
    assert replace(adaptation, steps="auto", batch_tokens=batch_tokens).num_steps == num_steps


def test_auto_ends_after_three_hundred_steps(adaptation: Adaptation) -> None:
    rows = [*adaptation.rows, *adaptation.rows]
    assert replace(adaptation, steps="auto", batch_tokens=16, rows=rows).num_steps == 300
