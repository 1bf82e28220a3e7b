"""Model cards: readable by the hub's own parser, and complete."""

import re
from datetime import date
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard as HubCard

from app.contracts.messages import ModelFacts, ModelKind
from app.model_card import Ancestor, DataFile, ModelCard

FACTS = ModelFacts(
    architecture="llama",
    num_layers=2,
    hidden_size=64,
    vocab_size=384,
    context_tokens=256,
    num_parameters=1_500_000,
    tokenizer_sha256="t",
    has_chat_template=True,
    weights_bytes=1,
    weights_sha256="w",
)
LLAMA = Ancestor("teacher", "hf:org/llama@abc", "apache-2.0")


def card(**changes: Any) -> ModelCard:
    values: dict[str, Any] = {
        "model_id": "ds:tiny:support:1",
        "facts": FACTS,
        "made_on": date(2026, 11, 28),
        "teacher": "teacher",
        "start": "teacher",
        "result": {
            "teacher": {"kl": 0.0, "intervals": {"kl": [0.0, 0.0]}},
            "student": {
                "kl": 0.7243,
                "agreement": 0.652,
                "num_layers": 2,
                "intervals": {"kl": [0.70, 0.75], "agreement": [0.64, 0.66]},
            },
        },
        "spec": {
            "kind": "distillation",
            "seed": 7,
            "teacher": {"key": "models/secret-path"},
            "distillation": {"loss": {"type": "fkl"}, "gate": None},
        },
        "files": (DataFile("training", 1888, "5" * 64),),
        "ancestors": (LLAMA,),
        "trained_tokens": 12_345,
        "versions": {"torch": "2.13.0"},
    }
    return ModelCard(**(values | changes))


def matter(text: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert match is not None
    parsed: dict[str, Any] = yaml.safe_load(match[1])
    return parsed


def test_a_card_says_what_a_model_is_made_of() -> None:
    text = card().render()
    assert matter(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "base_model": ["org/llama"],
        "tags": ["stillhouse", "distillation"],
    }
    for part in (
        "- Teacher: `teacher`",
        "from `hf:org/llama@abc`: licence apache-2.0",
        f"| training | 1,888 | `{'5' * 64}` |",
        "12,345 tokens",
        "| kl | 0 (0 to 0) | 0.7243 (0.7 to 0.75) |",
        "| agreement |  | 0.652 (0.64 to 0.66) |",
        "type: fkl",
        "seed: 7",
        "torch 2.13.0",
        "AutoModelForCausalLM.from_pretrained",
        "stillhouse models import",
    ):
        assert part in text, part
    assert "secret-path" not in text
    assert "gate" not in text


def test_the_parser_of_the_hub_reads_the_card() -> None:
    parsed = HubCard(card().render())
    data = parsed.data.to_dict()
    assert (data["license"], data["base_model"]) == ("apache-2.0", ["org/llama"])
    assert parsed.text.strip().startswith("# ds:tiny:support:1")


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        ([None], {}),
        (["mit", "mit"], {"license": "mit"}),
        (["mit", None], {"license": "other", "license_name": "mit and unknown"}),
        (["mit", "gpl-3.0"], {"license": "other", "license_name": "gpl-3.0 and mit"}),
        ([], {}),
    ],
)
def test_the_licence_of_a_student_is_that_of_all_it_comes_from(
    licenses: list[str | None], expected: dict[str, str]
) -> None:
    ancestors = tuple(
        Ancestor(f"m{number}", None, license_) for number, license_ in enumerate(licenses)
    )
    fields = matter(card(ancestors=ancestors).render())
    assert {
        name: fields[name] for name in ("license", "license_name") if name in fields
    } == expected


def test_an_imported_model_has_no_recipe_and_no_figures() -> None:
    imported = Ancestor("tiny", None, None)
    text = card(
        model_id="tiny", teacher=None, start=None, result={}, files=(), ancestors=(imported,)
    ).render()
    assert "imported into Stillhouse on 2026-11-28" in text
    assert "- Imported model: licence unknown" in text
    for part in ("## Recipe", "## Figures", "## Data"):
        assert part not in text


@pytest.mark.parametrize(
    ("family", "task"), [("seq2seq", "text2text-generation"), ("masked", "fill-mask")]
)
def test_the_task_follows_the_kind(family: ModelKind, task: str) -> None:
    text = card(facts=FACTS.model_copy(update={"family": family})).render()
    assert matter(text)["pipeline_tag"] == task
    assert ("curl" in text) is (family != "masked")


def test_names_and_results_cannot_break_the_card() -> None:
    hostile = "a`b|c\n---\nlicense: evil <script>"
    text = card(
        model_id=hostile,
        teacher=hostile,
        spec={"note": "```\n# heading"},
        result={"student": {"kl": "x", "intervals": {"kl": "y", "z|`": [1, 2]}, "z|`": 3.0}},
        ancestors=(Ancestor(hostile, hostile, hostile),),
    ).render()
    assert matter(text)["license"] == hostile
    assert "<script>" not in text.split("\n---\n", 1)[1]
    assert text.count("```") % 2 == 0


def test_a_supervised_model_has_figures_and_no_teacher() -> None:
    entry = {"loss": 0.5, "intervals": {"loss": [0.4, 0.6]}}
    text = card(
        teacher=None,
        result={"before": {**entry, "loss": 2.5}, "after": entry},
        spec={
            "kind": "distillation",
            "method": "supervised",
            "distillation": {"teacher": "teacher", "seed": 7},
        },
    ).render()
    assert "| metric | before | after |" in text
    assert "teacher:" not in text.split("## Recipe")[1]
