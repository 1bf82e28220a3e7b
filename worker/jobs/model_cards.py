"""Writes the model card of a finished run into the folder of its model."""

from datetime import UTC, datetime
from pathlib import Path

from app.contracts.datasets import DatasetJob
from app.contracts.messages import ImportJob, ModelFacts
from app.db.registry.lineage import Origin, source_of
from app.model_card import CARD, Ancestor, ModelCard, library_versions
from worker.jobs.lease_client import Lease
from worker.protocol.run_lines import ResultLine


def write_card(folder: Path, lease: Lease, origin: Origin, line: ResultLine) -> None:
    """Writes README.md. Replaces the file instead of changing it, because it may be a hard link."""
    spec, ancestors = lease.spec, origin.ancestors
    assert not isinstance(spec, DatasetJob), "a data set job makes no model"
    if isinstance(spec, ImportJob):
        source, license_ = source_of(line.result)
        ancestors = (Ancestor(spec.output_model, source, license_),)
    card = ModelCard(
        model_id=spec.output_model,
        facts=ModelFacts.model_validate(line.facts),
        made_on=datetime.now(UTC).date(),
        teacher=origin.teacher,
        start=origin.start,
        result=line.result,
        spec=spec.model_dump(mode="json"),
        files=origin.files,
        ancestors=ancestors,
        trained_tokens=line.trained_tokens or None,
        versions=library_versions(),
    )
    (folder / CARD).unlink(missing_ok=True)
    (folder / CARD).write_text(card.render())
