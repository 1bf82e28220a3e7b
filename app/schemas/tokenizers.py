"""Bodies of /tokenize, /detokenize and /tokenizer_info, in the format of vLLM."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.schemas.chat.messages import ChatMessage
from app.schemas.completions import ModelId, Token, Unused

MAX_CHARACTERS = 1_000_000
MAX_TOKENS = 65_536  # decoding more would block other threads too long


class TokenizeBody(BaseModel):
    """Body of a request for the tokens of a text, or of a chat with an opened answer."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    model: ModelId | None = None
    prompt: Annotated[str, Field(max_length=MAX_CHARACTERS)] | None = None
    messages: (
        Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)] | None
    ) = None
    add_special_tokens: bool = True
    return_token_strs: Unused = None

    @model_validator(mode="after")
    def _has_one_prompt(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(BaseModel):
    """Body of a request for the text of tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    model: ModelId | None = None
    tokens: Annotated[list[Token], Field(max_length=MAX_TOKENS, fail_fast=True)]


class Tokens(BaseModel):
    """Tokens of a prompt. `max_model_len` is the largest number that a request may use."""

    count: int
    max_model_len: int | None
    tokens: list[int]


class TokenizedText(BaseModel):
    """Text of some tokens."""

    prompt: str


class InputTokens(BaseModel):
    """Number of tokens of an input."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


class TokenizerInfo(BaseModel):
    """Special tokens and chat template of a model."""

    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    sep_token: str | None
    pad_token: str | None
    cls_token: str | None
    mask_token: str | None
    tokenizer_class: str
    chat_template: str | None
