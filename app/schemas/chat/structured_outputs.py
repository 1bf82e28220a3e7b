"""Parameters of a request that constrain the text of its answer."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from app.structured_outputs.regex_check import MAX_CHARACTERS

Json = Any  # Any: a JSON Schema, which is checked later
SchemaName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Choice = Annotated[str, StringConstraints(min_length=1, max_length=1024)]


class JsonSchemaFormat(BaseModel):
    """Schema of a `response_format`. With `strict`, the rules of OpenAI's strict mode apply."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    name: SchemaName
    description: str | None = None
    schema_: Json = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """Format of an answer, as in the OpenAI API."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_belongs_to_its_type(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is required with type 'json_schema', and only there")
        return self


class StructuredOutputs(BaseModel):
    """Constraint on an answer, as in vLLM. Exactly one kind is given.

    White space between the parts of JSON is never generated, so `disable_any_whitespace` has no
    effect.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    json_: Json = Field(None, alias="json")
    regex: Annotated[str, StringConstraints(min_length=1, max_length=MAX_CHARACTERS)] | None = None
    choice: Annotated[list[Choice], Field(min_length=1, max_length=1000, fail_fast=True)] | None = (
        None
    )
    grammar: Annotated[str, StringConstraints(min_length=1, max_length=200_000)] | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: Literal[False] | None = None
    whitespace_pattern: None = None

    @model_validator(mode="after")
    def _has_one_kind(self) -> "StructuredOutputs":
        kinds = (self.json_, self.regex, self.choice, self.grammar, self.json_object or None)
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError("give exactly one of json, regex, choice, grammar and json_object")
        return self

    @property
    def is_json(self) -> bool:
        """True if the answer is JSON, and false if it matches a regex or a grammar."""
        return self.json_ is not None or bool(self.json_object)
