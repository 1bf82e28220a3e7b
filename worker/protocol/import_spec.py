"""Spec file that `python -m worker.import_model SPEC.json --out DIR` reads.

It is a module of its own, so that the supervisor does not import any model library.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict


class ImportSpec(BaseModel):
    """Input of an import: a staged folder or file, or a model on the hub.

    `num_threads` of 0 leaves the default of PyTorch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["folder", "gguf", "archive", "hub"]
    source_path: Path | None = None
    hub: str | None = None
    num_threads: int = 0
