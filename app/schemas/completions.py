"""Request bodies of /v1/completions and /v1/chat/completions. All numbers have bounds."""

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar

import orjson
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from app.contracts.generation import (
    Fraction,
    Grammar,
    Penalty,
    RepetitionPenalty,
    Sampling,
    Temperature,
    ToolUse,
    TopK,
)
from app.errors import BadRequest
from app.schemas.chat.messages import ChatMessage, check_results
from app.schemas.chat.structured_outputs import ResponseFormat, StructuredOutputs
from app.schemas.chat.tools import (
    ToolBodies,
    ToolBody,
    ToolChoice,
    check_parameters,
    chosen_names,
    tool_use_of,
)
from app.schemas.jobs import Metadata
from app.structured_outputs.request_grammar import request_grammar

ModelId = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Token = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
# fail_fast: otherwise a list of invalid items creates one error per item, and a long list blocks
# the event loop.
TokenPrompt = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
TextPrompt = Annotated[str, StringConstraints(strict=True)]
TokenId = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,8})$")]
LogitBias = Annotated[
    dict[TokenId, Annotated[float, Field(ge=-100.0, le=100.0)]], Field(max_length=1024)
]
MinTokens = Annotated[int, Field(ge=0, le=1_000_000)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
TINY = 1e-9
Unused = Any  # a parameter of OpenAI that is accepted and has no effect
Unsupported = Any  # a parameter that is refused unless its value has no effect
Json = dict[str, Any]  # Any: JSON of the client
MAX_VARIABLES_BYTES = 16_384
# Variables of a chat template that the service sets, and options of the function that renders it.
RESERVED_VARIABLES = frozenset(
    {
        "messages",
        "tools",
        "add_generation_prompt",
        "conversation",
        "conversations",
        "chat_template",
        "continue_final_message",
        "return_assistant_tokens_mask",
    }
)


class StreamOptions(BaseModel):
    """Options of a streamed response."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    include_usage: bool = False
    include_obfuscation: bool | None = None


class GenerationBody(BaseModel):
    """Parameters of both routes.

    `neutral` maps each unsupported parameter to the values that are accepted because they have no
    effect. `default_tokens` is the default of max_tokens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)
    neutral: ClassVar[dict[str, tuple[object, ...]]] = {}
    default_tokens: ClassVar[int]

    model: ModelId
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    temperature: Temperature | None = None
    top_p: Fraction | None = None
    top_k: TopK | None = None
    min_p: Fraction | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: LogitBias | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63 - 128)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=64)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=64, fail_fast=True)] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    guided_json: Unsupported = None
    guided_regex: Unsupported = None
    guided_choice: Unsupported = None
    guided_grammar: Unsupported = None
    guided_decoding_backend: Unsupported = None
    guided_whitespace_pattern: Unsupported = None
    user: Unused = None
    store: Unused = None
    metadata: Unused = None
    safety_identifier: Unused = None
    prompt_cache_key: Unused = None
    prompt_cache_retention: Unused = None
    prompt_cache_options: Unused = None
    service_tier: Unused = None

    # The subclasses declare min_tokens after the fields it is compared with, because a validator
    # sees only the fields before its own.
    @field_validator("min_tokens", check_fields=False)
    @classmethod
    def _max_tokens_hold_min_tokens(cls, value: int | None, info: ValidationInfo) -> int | None:
        given = (
            info.data.get("max_completion_tokens")
            or info.data.get("max_tokens")
            or cls.default_tokens
        )
        if value is not None and value > given:
            raise ValueError(f"must be at most max_tokens, which is {given}")
        return value

    @model_validator(mode="after")
    def _options_belong_to_a_stream(self) -> "GenerationBody":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream=true")
        return self

    def unsupported(self) -> str | None:
        """Returns the name of the first parameter that requests an unsupported feature, if any."""
        for name, values in self.neutral.items():
            value = getattr(self, name)
            if value is not None and not any(value == neutral for neutral in values):
                return name
        return None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @cached_property
    def grammar(self) -> Grammar | None:
        """Grammar of the answer. Raises BadRequest. Takes milliseconds for a large schema."""
        for name in GUIDED:
            if getattr(self, name) is not None:
                raise BadRequest(
                    f"{name} is not supported; use structured_outputs instead",
                    "unsupported_parameter",
                    name,
                )
        grammar = request_grammar(self.response_format, self.structured_outputs)
        for name in ("ignore_eos", "echo"):
            if grammar is not None and getattr(self, name, None):
                raise BadRequest(
                    f"{name} is not supported with a structured output; leave it out",
                    "unsupported_parameter",
                    name,
                )
        return grammar

    def _sampling(
        self,
        *,
        max_tokens: int,
        min_tokens: int | None,
        logprobs: int | None,
        fits_context: bool = False,
    ) -> Sampling:
        given: dict[str, Any] = {  # Any: parameters of several types
            name: value for name in SHARED if (value := getattr(self, name)) is not None
        }
        if self.top_p is not None:
            # both 0 and TINY keep only the most likely token
            given["top_p"] = max(self.top_p, TINY)
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            **given,
            max_tokens=max_tokens,
            fits_context=fits_context,
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            min_tokens=min_tokens or 0,
            stop=stops,
            logprobs=logprobs,
            grammar=self.grammar,
        )


# Parameters that have the same name and form in a body and in `Sampling`.
CONVERTED = {"max_tokens", "stop", "logit_bias"}
# Parameters of older versions of vLLM.
GUIDED = tuple(name for name in GenerationBody.model_fields if name.startswith("guided_"))
SHARED = (Sampling.model_fields.keys() & GenerationBody.model_fields.keys()) - CONVERTED


class CompletionBody(GenerationBody):
    """Body of a request to /v1/completions."""

    neutral = {"suffix": ("",)}
    default_tokens = 16  # OpenAI's default

    prompt: (
        TextPrompt
        | TokenPrompt
        | Annotated[list[TextPrompt], Field(min_length=1, fail_fast=True)]
        | Annotated[list[TokenPrompt], Field(min_length=1, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    min_tokens: MinTokens | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    echo: bool | None = None
    suffix: Unsupported = None

    @field_validator("best_of")
    @classmethod
    def _best_of_holds_n(cls, value: int | None, info: ValidationInfo) -> int | None:
        n = info.data.get("n") or 1
        if value is not None and value < n:
            raise ValueError(f"must be at least n, which is {n}")
        if value is not None and value > n and info.data.get("max_tokens") == 0:
            raise ValueError("must be n if max_tokens is 0, because there is nothing to compare")
        if value is not None and value > n and info.data.get("stream"):
            raise ValueError(
                "the best choices are known only at the end and cannot be streamed; leave out stream or best_of"
            )
        return value

    @property
    def prompts(self) -> Sequence[str | tuple[int, ...]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [tuple(self.prompt)]
        return [
            part if isinstance(part, str) else tuple(part)
            for part in self.prompt
            if not isinstance(part, int)
        ]

    def sampling(self) -> Sampling:
        sampling = self._sampling(
            max_tokens=self.default_tokens if self.max_tokens is None else self.max_tokens,
            min_tokens=self.min_tokens,
            logprobs=self.logprobs,
        )
        return sampling.model_copy(update={"best_of": self.best_of, "echo": bool(self.echo)})


class ChatBody(GenerationBody):
    """Body of a request to /v1/chat/completions."""

    # OpenAI's default is the complete context. An answer that does not end should not fill it.
    default_tokens = 512
    neutral = {
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "moderation": (),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    store: bool | None = None
    metadata: Metadata | None = None
    min_tokens: MinTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: ToolBodies | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: Json | None = None
    functions: Unsupported = None
    function_call: Unsupported = None
    modalities: Unsupported = None
    audio: Unsupported = None
    prediction: Unsupported = None
    web_search_options: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None
    moderation: Unsupported = None

    @field_validator("tools")
    @classmethod
    def _names_differ(cls, value: list[ToolBody] | None) -> list[ToolBody] | None:
        names = [tool.function.name for tool in value or ()]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"the name {twice[0]!r} is used twice; give each tool its own name")
        return value

    @field_validator("tool_choice")
    @classmethod
    def _chosen_tools_exist(cls, value: ToolChoice | None, info: ValidationInfo) -> Any:
        names = {tool.function.name for tool in info.data.get("tools") or ()}
        if value not in (None, "none", "auto") and not names:
            raise ValueError("tool_choice is only allowed with tools")
        if unknown := [name for name in chosen_names(value) if name not in names]:
            raise ValueError(f"there is no tool {unknown[0]!r} in tools")
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _variables_are_small_and_free(cls, value: Json | None) -> Json | None:
        if taken := sorted(RESERVED_VARIABLES & (value or {}).keys()):
            raise ValueError(f"the service sets {taken[0]}; leave it out")
        if len(orjson.dumps(value)) > MAX_VARIABLES_BYTES:
            raise ValueError(f"must have at most {MAX_VARIABLES_BYTES:,} bytes of JSON")
        return value

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed with logprobs=true")
        return self

    def tool_use(self) -> ToolUse | None:
        return tool_use_of(
            self.tools or [], self.tool_choice, is_parallel=self.parallel_tool_calls is not False
        )

    def check(self) -> None:
        """Checks what depends on several messages, and the tools. Raises BadRequest."""
        check_results(self.messages)
        check_parameters(self.tools or [])
        outputs, tool_use = self.structured_outputs, self.tool_use()
        if outputs is None or outputs.is_json or tool_use is None or tool_use.choice == "none":
            return
        raise BadRequest(
            "structured_outputs with regex, choice or grammar is not supported beside tools; "
            "leave out one of them, or set tool_choice to 'none'",
            "unsupported_parameter",
            "structured_outputs",
        )

    def sampling(self) -> Sampling:
        asked = self.max_completion_tokens or self.max_tokens
        return self._sampling(
            max_tokens=asked or self.default_tokens,
            min_tokens=self.min_tokens,
            fits_context=asked is None,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )
