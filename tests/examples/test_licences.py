"""The licences example reads rules as notices, keeps its sides apart, and posts jobs that the API takes."""

import zipfile
from pathlib import Path

import pytest

from app.contracts.distillation import Distillation
from app.schemas.jobs import CreateJob
from examples.licences.jobs import NUM_LAYERS, adaptation, distillation
from examples.licences.measure import Score, bootstrap, macro_f1
from examples.licences.plot import Point, draw
from examples.licences.prepare_rows import CLASSES, LIKE, MAX_ALIKE, Notice, read_notices, split
from examples.licences.study import SIZES

LICENCES = {"mit": "Permissive", "gpl-2.0": "Copyleft", "lgpl-2.1": "Copyleft Limited"}
LONG = "is free software that everybody may use under the terms below, as stated in its files"


def rule(expression: str, text: str, kind: str = "license_notice") -> str:
    return f"---\nlicense_expression: {expression}\nis_{kind}: yes\nrelevance: 100\n---\n\n{text}\n"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    rules = {
        "a": rule("mit", f"This {{{{program}}}}\n  {LONG}"),
        "b": rule("gpl-2.0 AND mit", f"That {LONG}"),
        "c": rule("gpl-2.0 OR (gpl-2.0 WITH mit)", f"Thus {LONG}"),
        "d": rule("mit", "MIT"),
        "e": rule("mit", f"Reference {LONG}", "license_reference"),
        "f": rule("lgpl-2.1", "word " * 200),
        "g": rule("mit", f"免费 {LONG}"),
        "h": rule("unheard-of", f"Other {LONG}"),
    }
    path = tmp_path / "x.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for key, category in LICENCES.items():
            archive.writestr(
                f"licenses/{key}.LICENSE", f"---\nkey: {key}\ncategory: {category}\n---\ntext"
            )
        for name, content in rules.items():
            archive.writestr(f"rules/{name}.RULE", content)
    return path


def test_only_english_notices_with_a_single_class_are_kept(wheel: Path) -> None:
    first, last = read_notices(wheel)
    assert first == Notice(f"This program {LONG}", "permissive")
    assert last.label == "weak copyleft"
    assert len(last.text) <= 400
    assert not last.text.endswith(" ")


def test_notices_that_begin_alike_are_on_one_side() -> None:
    def beginning(number: int) -> str:
        return "".join(chr(ord("a") + int(digit)) for digit in f"{number:04}") * 20

    notices = [
        Notice(f"{beginning(group)} {'x' * (1 + number)}", "copyleft")
        for group in range(400)
        for number in range(12)
    ]
    sides = split(notices)
    assert all(sides)
    groups = [{notice.text[:LIKE] for notice in side} for side in sides]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 400
    assert sum(map(len, sides)) == 400 * MAX_ALIKE
    assert split(reversed(notices)) == sides


def test_macro_f1_is_the_mean_over_classes() -> None:
    pairs = [(CLASSES[0], CLASSES[0])] * 3 + [(CLASSES[0], CLASSES[1]), (CLASSES[1], CLASSES[1])]
    assert macro_f1(pairs) == pytest.approx((6 / 7 + 2 / 3) / 2)
    score = bootstrap(macro_f1, pairs * 50)
    assert score.low < score.value < score.high


def test_the_api_takes_the_adaptation() -> None:
    asked = CreateJob.model_validate(adaptation("file-1", "file-2", 0))
    assert asked.supervised.hyperparameters is not None
    assert asked.supervised.hyperparameters.n_epochs == 1


def test_the_api_takes_the_distillation() -> None:
    body = distillation("t", "file-1", "file-2", 0, at_least=0.8123)
    block = Distillation.model_validate(body["method"]["distillation"])
    assert block.student.num_layers == NUM_LAYERS
    assert block.student.vocabulary == "rows"
    assert block.evaluation.gate is not None
    assert block.data.completions is None, "the teacher answers rows without labels"


@pytest.mark.parametrize("student", SIZES.values(), ids=SIZES)
def test_the_api_takes_the_students_of_the_study(student: dict[str, object]) -> None:
    body = distillation("t", "file-1", "file-2", 0, student=student, uses_teacher=False)
    block = Distillation.model_validate(body["method"]["distillation"])
    assert block.objective.teacher_signal == "text"
    assert block.data.completions == "dataset"
    assert block.evaluation.gate is None


def test_the_plot_is_an_image(tmp_path: Path) -> None:
    score = Score(0.8, 0.7, 0.9)
    draw([Point("a", 10, score, is_teacher=True), Point("b", 90, score)], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
