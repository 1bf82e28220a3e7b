"""The recipes that are compared: each is a distillation that the service accepts."""

import pytest

from app.contracts.distillation import Distillation
from bench.recipes import RECIPES, TASKS, block_of


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_valid_distillation(name: str) -> None:
    student = {"init": "layers", **TASKS["smollm2-half"]["student"]}
    Distillation.model_validate(block_of("smollm2-half", student, name, None))
