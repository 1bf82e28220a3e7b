"""Response bodies of /v1/files."""

from typing import Any, Literal

from pydantic import BaseModel

from app.db.schema.tables import File


class FileObject(BaseModel):
    """File in the format of OpenAI, with additional fields.

    `sha256`, `format`, `rows` and `details` are determined during the upload. `details` has
    counts: keys that are ignored, rows with tools, and rows with tool calls.
    """

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: str | None = None
    sha256: str
    format: str | None
    rows: int | None
    details: dict[str, Any] | None = None  # Any: counts, some of them by name

    @classmethod
    def of(cls, row: File) -> "FileObject":
        return cls(
            id=row.id,
            bytes=row.bytes,
            created_at=int(row.created_at.timestamp()),
            expires_at=int(row.expires_at.timestamp()) if row.expires_at else None,
            filename=row.filename,
            purpose=row.purpose,
            sha256=row.sha256,
            format=row.format,
            rows=row.num_rows,
            details=row.details,
        )


class Deleted(BaseModel):
    """Confirmation that an object has been deleted."""

    id: str
    object: str
    deleted: Literal[True] = True
