"""Spec file that `python -m worker.build_dataset SPEC.json --out DIR` reads."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from app.contracts.datasets import DatasetOptions


class DatasetSpec(BaseModel):
    """Input of a data set: the records that the supervisor has exported, newest first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    records_path: Path
    options: DatasetOptions
    max_row_bytes: int
