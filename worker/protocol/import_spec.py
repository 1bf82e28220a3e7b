"""What `python -m worker.import_model SPEC.json --out DIR` reads. Apart, for the supervisor loads no model library."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict


class ImportSpec(BaseModel):
    """What is imported: a staged folder or file, or a model on the hub."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["folder", "gguf", "hub"]
    source_path: Path | None = None
    hub: str | None = None
    num_threads: int = 0
