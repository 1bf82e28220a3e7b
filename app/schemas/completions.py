"""HTTP bodies of /v1/completions and /v1/chat/completions that come in; every number is bounded."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from app.contracts import Message, Sampling

ModelId = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Token = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
TokenPrompt = Annotated[list[Token], Field(min_length=1)]
TextPrompt = Annotated[str, StringConstraints(strict=True)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Unused = Any  # a parameter of OpenAI that is accepted and changes nothing here
Unsupported = Any  # a parameter that is refused unless it has a value without effect

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default
DEFAULT_CHAT_TOKENS = (
    512  # OpenAI's is the whole context; an answer that never ends should not take all of it
)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    include_usage: bool = False
    include_obfuscation: bool | None = None


class GenerationBody(BaseModel):
    """What both routes take."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    neutral: ClassVar[dict[str, tuple[object, ...]]] = {}

    model: ModelId
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63 - 128)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    user: Unused = None
    store: Unused = None
    metadata: Unused = None
    safety_identifier: Unused = None
    prompt_cache_key: Unused = None
    prompt_cache_retention: Unused = None
    service_tier: Unused = None

    frequency_penalty: Unsupported = None
    presence_penalty: Unsupported = None
    logit_bias: Unsupported = None

    @model_validator(mode="after")
    def _options_belong_to_a_stream(self) -> "GenerationBody":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream=true")
        return self

    def unsupported(self) -> str | None:
        """Name of the first parameter that asks for something this service cannot do yet."""
        for name, values in self.neutral.items():
            value = getattr(self, name)
            if value is not None and not any(value == neutral for neutral in values):
                return name
        return None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    def _sampling(self, *, max_tokens: int, logprobs: int | None, fits_context: bool = False) -> Sampling:
        stops = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return Sampling(
            max_tokens=max_tokens,
            fits_context=fits_context,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=stops,
            logprobs=logprobs,
            ignore_eos=self.ignore_eos,
        )


class CompletionBody(GenerationBody):
    neutral = {
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "logit_bias": ({},),
        "echo": (False,),
        "suffix": ("",),
    }

    prompt: (
        TextPrompt
        | TokenPrompt
        | Annotated[list[TextPrompt], Field(min_length=1)]
        | Annotated[list[TokenPrompt], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    echo: Unsupported = None
    suffix: Unsupported = None

    def unsupported(self) -> str | None:
        if self.best_of is not None and self.best_of != self.num_choices:
            return "best_of"
        return super().unsupported()

    @property
    def prompts(self) -> Sequence[str | tuple[int, ...]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [tuple(token for token in self.prompt if isinstance(token, int))]
        return [
            part if isinstance(part, str) else tuple(part)
            for part in self.prompt
            if not isinstance(part, int)
        ]

    def sampling(self) -> Sampling:
        return self._sampling(max_tokens=self.max_tokens or DEFAULT_COMPLETION_TOKENS, logprobs=self.logprobs)


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message; the fields that must be null are those an answer of ours carries when it is sent back."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    def message(self) -> Message:
        # Chat templates know nothing of `developer`, OpenAI's newer word for `system`.
        return Message(role="system" if self.role == "developer" else self.role, content=self.text())


class ChatBody(GenerationBody):
    neutral = {
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "logit_bias": ({},),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Unsupported = None
    tool_choice: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    parallel_tool_calls: Unsupported = None
    response_format: Unsupported = None
    modalities: Unsupported = None
    audio: Unsupported = None
    prediction: Unsupported = None
    web_search_options: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed with logprobs=true")
        return self

    def sampling(self) -> Sampling:
        asked = self.max_completion_tokens or self.max_tokens
        return self._sampling(
            max_tokens=asked or DEFAULT_CHAT_TOKENS,
            fits_context=asked is None,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )
