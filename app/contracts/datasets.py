"""Options of a data set that is made from stored completions, and the specification of its job."""

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

MaskKind = Literal["email", "phone", "iban", "card", "ip_address", "secret"]
MASK_KINDS: tuple[MaskKind, ...] = get_args(MaskKind)
Side = Literal["training", "validation", "test"]
SIDES: tuple[Side, ...] = get_args(Side)
FinishReason = Literal["stop", "tool_calls", "length"]
Fraction = Annotated[float, Field(ge=0.0, le=0.5)]


class Options(BaseModel):
    """Base class of the options: immutable, and unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RecordFilter(Options):
    """Selects stored completions. A field that is null selects all.

    Times are in seconds since the epoch. The interval does not contain its end.
    """

    model: str | None = None
    metadata: dict[str, str] = {}
    created_after: float | None = None
    created_before: float | None = None


class DatasetOptions(Options):
    """Rules that make rows from the selected completions.

    limit: Maximum number of completions. The newest are used.
    finish_reasons: An answer that ended for another reason is left out.
    mask: Kinds of personal data and secrets that are replaced by placeholders.
    near_duplicates: Jaccard similarity from which one of two conversations is left out, and from
        which two questions are on the same side. Null disables both.
    validation_fraction, test_fraction: Shares of the questions on these sides.
    """

    limit: Annotated[int, Field(ge=1, le=100_000)] = 10_000
    finish_reasons: Annotated[tuple[FinishReason, ...], Field(min_length=1, max_length=3)] = (
        "stop",
        "tool_calls",
    )
    min_answer_characters: Annotated[int, Field(ge=1, le=100_000)] = 1
    mask: Annotated[tuple[MaskKind, ...], Field(max_length=len(MASK_KINDS))] = ()
    near_duplicates: Annotated[float, Field(ge=0.5, le=1.0)] | None = 0.8
    validation_fraction: Fraction = 0.1
    test_fraction: Fraction = 0.1


class DatasetJob(Options):
    """Specification of a job that makes a data set.

    max_bytes: Maximum total size of the completions. The oldest are left out above it.
    max_row_bytes: Maximum size of a row. Longer rows are left out.
    """

    kind: Literal["dataset"] = "dataset"
    name: str
    records: RecordFilter
    options: DatasetOptions
    max_bytes: int
    max_row_bytes: int
