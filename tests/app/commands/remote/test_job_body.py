"""`stillhouse jobs create`: the request that its options make."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from app.commands.remote.job_body import JobOptions, job_body

Json = dict[str, Any]  # Any: JSON bodies of the API


def options(**given: Any) -> JobOptions:  # Any: the fields of JobOptions
    nothing = {"model": None, "teacher": None, "suffix": None, "layers": None, "epochs": None}
    nothing |= {"seed": None, "method_json": None}
    return JobOptions(**{**nothing, "metadata": (), "is_supervised": False, **given})


def block_of(**given: Any) -> Json:  # Any: as above
    method = job_body(options(**given))["method"]
    block: Json = method[method["type"]]
    return block


def test_a_teacher_alone_is_also_the_start_model() -> None:
    assert job_body(options(teacher="big")) == {
        "model": "big",
        "method": {"type": "distillation", "distillation": {"teacher": "big"}},
    }
    assert job_body(options(model="big")) == job_body(options(teacher="big"))


def test_all_options_are_in_the_request() -> None:
    body = job_body(
        options(model="small", teacher="big", suffix="faq", layers="8", epochs=2, seed=0,
                metadata=["team=x", "note=a=b"])
    )  # fmt: skip
    assert body == {
        "model": "small",
        "suffix": "faq",
        "seed": 0,
        "metadata": {"team": "x", "note": "a=b"},
        "method": {
            "type": "distillation",
            "distillation": {
                "teacher": "big",
                "student": {"num_layers": 8},
                "hyperparameters": {"n_epochs": 2},
            },
        },
    }


def test_several_numbers_of_layers_are_a_ladder() -> None:
    assert block_of(teacher="big", layers="12, 8,4")["student"] == {"num_layers": [12, 8, 4]}


def test_a_supervised_job_has_no_teacher() -> None:
    assert job_body(options(model="m", is_supervised=True, epochs=3)) == {
        "model": "m",
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}},
    }


def test_further_options_of_the_method_are_merged() -> None:
    further = {"student": {"init": "layers"}, "hyperparameters": {"batch_tokens": 256}}
    block = block_of(teacher="big", layers="2", epochs=1, method_json=json.dumps(further))
    assert block == {
        "teacher": "big",
        "student": {"init": "layers", "num_layers": 2},
        "hyperparameters": {"batch_tokens": 256, "n_epochs": 1},
    }


def test_a_complete_method_may_be_a_file(tmp_path: Path) -> None:
    method = {"type": "distillation", "distillation": {"teacher": "big", "student": {}}}
    (tmp_path / "method.json").write_text(json.dumps(method))
    body = job_body(options(method_json=f"@{tmp_path / 'method.json'}"))
    assert body == {"model": "big", "method": method}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give --teacher, --model or both"),
        ({"is_supervised": True}, "needs --model"),
        ({"is_supervised": True, "model": "m", "teacher": "t"}, "has no --teacher"),
        ({"is_supervised": True, "model": "m", "layers": "2"}, "has no --layers"),
        ({"teacher": "t", "layers": "two"}, "--layers is 'two'"),
        ({"teacher": "t", "metadata": ["team"]}, "key=value"),
        ({"teacher": "t", "method_json": "{"}, "not JSON"),
        ({"teacher": "t", "method_json": "[]"}, "must be a JSON object"),
        ({"teacher": "t", "method_json": "@/absent"}, "cannot read '/absent'"),
        ({"teacher": "t", "method_json": '{"type": "supervised"}'}, "--supervised chooses"),
        ({"teacher": "t", "method_json": '{"teacher": "u"}'}, "different values for 'teacher'"),
        ({"teacher": "t", "layers": "2", "method_json": '{"student": 1}'}, "must be an object"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_advice(given: Json, message: str) -> None:
    with pytest.raises(typer.BadParameter) as refused:
        job_body(options(**given))
    assert message in str(refused.value)
