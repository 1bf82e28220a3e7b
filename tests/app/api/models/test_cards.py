"""Model cards over real HTTP."""

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import yaml
from sqlalchemy import text

from app.db import jobs, models
from app.db.registry.lineage import origin_of
from app.db.session import transaction
from app.model_card import Ancestor, DataFile
from app.storage import store
from tests.app.api.conftest import Service

Register = Callable[..., str]


def test_a_stored_card_is_shown(http: httpx.Client, register: Register, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# ü\n")
    register("tiny", folder=tmp_path)
    card = http.get("/v1/models/tiny/card")
    assert (card.status_code, card.text) == (200, "---\nlicense: mit\n---\n# ü\n")
    assert card.headers["content-type"] == "text/markdown; charset=utf-8"


def test_a_model_without_a_stored_card_gets_one_from_its_row(
    http: httpx.Client, register: Register
) -> None:
    register("tiny")
    card = http.get("/v1/models/tiny/card").text
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "text-generation"
    assert "# tiny" in card
    assert "imported into Stillhouse" in card
    assert http.get("/v1/models/gone/card").status_code == 404


def test_a_card_is_visible_where_its_model_is(service: Service, register: Register) -> None:
    register("tiny")
    register("shared", project_id=None)
    with service.http(service.new_key("rival")) as stranger:
        assert stranger.get("/v1/models/tiny/card").status_code == 404
        assert stranger.get("/v1/models/shared/card").status_code == 200


def test_the_origin_of_a_student_of_a_student_is_the_imported_models(
    http: httpx.Client, register: Register, tiny_llama_dir: Path
) -> None:
    for name, license_ in (("big", "apache-2.0"), ("small", "mit"), ("unrelated", "gpl")):
        register(name)
        source = {"format": "hub", "hub": f"org/{name}@main", "commit": "abc", "license": license_}
        with transaction() as session:
            session.execute(
                text(
                    "UPDATE models SET evaluation = jsonb_build_object('source', CAST(:s AS jsonb)) WHERE id = :id"
                ),
                {"id": name, "s": json.dumps(source)},
            )
    with transaction() as session:
        first = jobs.insert_job(
            session,
            id="ftjob-1",
            project_id="acme",
            kind="distillation",
            model_id="ds:1",
            spec={
                "teacher": {"key": "models/big"},
                "start": {"key": "models/small"},
                "training_file": {"key": "files/f", "sha256": "5" * 64},
                "distillation": {"teacher": "big"},
            },
            request={"model": "small"},
        )
        assert origin_of(session, first).files == (DataFile("training", None, "5" * 64),)
        big = models.find_model(session, "acme", "big")
        assert big is not None
        ref = store().put_folder(tiny_llama_dir, "models/ds1")
        columns = {"bytes": 1, "manifest_sha256": ref.sha256, "facts": big.facts}
        models.insert_model(
            session,
            id="ds:1",
            project_id="acme",
            origin="distilled",
            store_key=ref.key,
            source_job_id="ftjob-1",
            **columns,
        )
        second = jobs.insert_job(
            session,
            id="ftjob-2",
            project_id="acme",
            kind="distillation",
            model_id="ds:2",
            spec={
                "teacher": {"key": "models/big"},
                "start": {"key": "checkpoints/ftjob-1/7/step-5/model"},
            },
            request={"model": "ds:1"},
        )
        origin = origin_of(session, second)
    assert origin.start == "ds:1"
    assert origin.ancestors == (
        Ancestor("big", "hf:org/big@abc", "apache-2.0"),
        Ancestor("small", "hf:org/small@abc", "mit"),
    )
    card = http.get("/v1/models/ds:1/card").text
    assert yaml.safe_load(card.split("---")[1])["license_name"] == "apache-2.0 and mit"
