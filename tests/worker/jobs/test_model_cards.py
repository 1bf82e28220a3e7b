"""The model card that a train worker adds to the model of a finished run."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.contracts.messages import ArtifactRef, DistillationJob, ImportJob
from app.db.registry.lineage import Origin
from app.model_card import Ancestor, DataFile
from tests.app.test_model_card import FACTS
from worker.jobs.lease_client import Lease
from worker.jobs.model_cards import write_card
from worker.protocol.run_lines import ResultLine

NOTHING = Origin(None, None, (), ())


def line(**changes: Any) -> ResultLine:
    values: dict[str, Any] = {"folder": "model", "facts": FACTS.model_dump(), "result": {}}
    return ResultLine(**(values | changes))


def lease(spec: DistillationJob | ImportJob) -> Lease:
    return Lease("job", 1, 1, spec, "acme", None)


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    text = (folder / "README.md").read_text()
    return yaml.safe_load(text.split("---")[1]), text


def test_an_imported_model_names_its_repository_and_licence(tmp_path: Path) -> None:
    spec = ImportJob(output_model="tiny", hub="org/tiny@main", format="hub")
    source = {"format": "hub", "hub": "org/tiny@main", "commit": "abc", "license": "mit"}
    write_card(tmp_path, lease(spec), NOTHING, line(result={"source": source}))
    matter, text = card_of(tmp_path)
    assert (matter["license"], matter["base_model"]) == ("mit", ["org/tiny"])
    assert "- Imported model, from `hf:org/tiny@abc`: licence mit" in text
    assert "torch" in text


def test_a_student_names_its_teacher_its_data_and_its_recipe(tmp_path: Path) -> None:
    ref = ArtifactRef(key="models/secret", bytes=1)
    spec = DistillationJob.model_validate(
        {
            "distillation": {"teacher": "big"},
            "teacher": ref,
            "start": ref,
            "training_file": ref,
            "output_model": "ds:big::1",
            "seed": 7,
        }
    )
    origin = Origin(
        "big", "small", (DataFile("training", 9, "f" * 64),), (Ancestor("big", None, None),)
    )
    write_card(tmp_path, lease(spec), origin, line(trained_tokens=1234))
    _, text = card_of(tmp_path)
    for part in ("`big`", "`small`", "| training | 9 |", "1,234 tokens", "seed: 7", "teacher: big"):
        assert part in text, part
    assert "secret" not in text


def test_a_hard_link_of_an_older_card_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "stored.md").write_text("stored")
    os.link(tmp_path / "stored.md", tmp_path / "model" / "README.md")
    spec = ImportJob(output_model="tiny", format="folder")
    write_card(tmp_path / "model", lease(spec), NOTHING, line())
    assert (tmp_path / "stored.md").read_text() == "stored"
    assert "# tiny" in (tmp_path / "model" / "README.md").read_text()


def test_facts_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    spec = ImportJob(output_model="tiny", format="folder")
    with pytest.raises(ValueError, match="architecture"):
        write_card(tmp_path, lease(spec), NOTHING, line(facts={}))
    assert not (tmp_path / "README.md").exists()
