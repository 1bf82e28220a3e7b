"""Bodies of /v1/organization/usage/completions."""

from typing import Literal

from pydantic import BaseModel


class CompletionsUsage(BaseModel):
    """Usage of one group in one bucket. A field that the report is not grouped by is null.

    `input_tokens` includes `input_cached_tokens`, those that were in the prefix cache.
    """

    object: Literal["organization.usage.completions.result"] = (
        "organization.usage.completions.result"
    )
    input_tokens: int
    output_tokens: int
    num_model_requests: int
    input_cached_tokens: int
    input_uncached_tokens: int
    project_id: str | None = None
    user_id: str | None = None
    api_key_id: str | None = None
    model: str | None = None
    batch: bool | None = None
    service_tier: str | None = None
    api_source: str | None = None


class UsageBucket(BaseModel):
    """Usage in an interval of time, in seconds since the epoch and without its end."""

    object: Literal["bucket"] = "bucket"
    start_time: int
    end_time: int
    results: list[CompletionsUsage]


class UsagePage(BaseModel):
    """Page of buckets. Pass `next_page` as `page` to get the next one."""

    object: Literal["page"] = "page"
    data: list[UsageBucket]
    has_more: bool
    next_page: str | None
