"""The one-trip look-up of a generation request says what `resolve` says."""

import pytest

from app.db import models
from app.db.registry import aliases
from app.db.session import transaction
from app.errors import NotFound
from app.services import model_registry

FACTS = {
    "architecture": "LlamaForCausalLM", "num_layers": 2, "hidden_size": 8, "vocab_size": 10, "context_tokens": 64,
    "num_parameters": 5, "weights_bytes": 1, "weights_sha256": "0" * 64, "tokenizer_sha256": "0" * 64, "has_chat_template": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def registered(database: str) -> None:
    common = {"origin": "imported", "bytes": 1, "manifest_sha256": "0" * 64, "facts": FACTS}
    with transaction() as session:
        for name, project in (("mine", "p"), ("shared", None), ("theirs", "q")):
            models.insert_model(
                session, id=name, project_id=project, store_key=f"models/{name}", **common
            )
        models.insert_model(
            session,
            id="eight",
            project_id="p",
            store_key="models/eight",
            serving={"weights": "int8"},
            **common,
        )
        aliases.point_alias(session, "p", "m@prod", model_id="mine", key_id="k")
        aliases.point_alias(session, "q", "m@prod", model_id="theirs", key_id="k")


@pytest.mark.parametrize("asked", ["mine", "shared", "eight", "m@prod"])
def test_a_model_or_an_alias_is_the_same_in_one_trip(asked: str) -> None:
    with transaction() as session:
        expected = model_registry.resolve(session, "p", asked)
    assert model_registry.resolve_at_once("p", asked) == expected


def test_an_alias_means_what_it_means_in_the_callers_project() -> None:
    assert model_registry.resolve_at_once("q", "m@prod").model_id == "theirs"


@pytest.mark.parametrize(
    "asked", ["theirs", "none", "none@prod", "mine:ckpt-step-3", "mi\x00ne", ""]
)
def test_what_the_project_does_not_see_does_not_exist(asked: str) -> None:
    with pytest.raises(NotFound, match="does not exist"):
        model_registry.resolve_at_once("p", asked)
