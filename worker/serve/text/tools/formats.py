"""Formats in which models write tool calls, and the choice of the format of a model."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from worker.models.chat_templates import template_text
from worker.serve.text.tools.calls import Call, json_calls, python_calls

MAX_NAME_CHARACTERS = 128
NAME = re.compile(r"[A-Za-z_][\w.-]*")
BROKEN = -1

Head = Callable[[str], int | None]
Read = Callable[[str, str, Collection[str]], tuple[Call, ...]]


@dataclass(frozen=True)
class Layout:
    """Layout of the calls that a grammar makes a model write.

    call: One call. NAME and ARGUMENTS stand for its parts.
    before, after: Text of a block before its first call, after the mark, and after its last call.
    between_calls: Text between the calls of a block, or None if a block has one call only.
    between_blocks: Text between blocks, or None if an answer has one block only.
    has_mark: Whether a block begins with a mark.
    """

    call: str = '{"name": "NAME", "arguments": ARGUMENTS}'
    before: str = ""
    after: str = ""
    between_calls: str | None = None
    between_blocks: str | None = None
    has_mark: bool = True


ARRAY = Layout(before="[", after="]", between_calls=", ")


@dataclass(frozen=True)
class ToolFormat:
    """Format of tool calls. A block of calls begins with a mark, and may end with another one.

    begins: Marks that begin a block, anywhere in the answer.
    ends: Marks that may end a block. A missing one is no error.
    starters: Brackets that begin a block without a mark, at the start of an answer only.
    marks: Further marks, inside a block.
    separators: Characters between the calls of a block, besides spaces.
    is_repeated: Whether further calls may follow in a block without a mark.
    is_python: Whether calls are Python, else JSON.
    head: Function of the text of a block. Returns the position of the first bracket of the call,
        None if more text is needed, or BROKEN if the text cannot be a call.
    read: Function of the name before the bracket, if there is one, the text in brackets and the
        names of the tools. Returns the calls, or raises NotACall.
    layout: Layout of the calls that grammars make, or None if there are no grammars.
    id_length: Number of characters of the ids of calls, if templates of the format demand one.
    """

    name: str
    begins: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    starters: str = ""
    marks: tuple[str, ...] = ()
    separators: str = ""
    is_repeated: bool = False
    is_python: bool = False
    head: Head = lambda text: None
    read: Read = json_calls
    layout: Layout | None = None
    id_length: int | None = None

    @property
    def all_marks(self) -> frozenset[str]:
        return frozenset((*self.begins, *self.ends, *self.marks))


def bracket_head(brackets: str) -> Head:
    """Returns a head function: only spaces may precede one of these brackets."""

    def find(text: str) -> int | None:
        """Head function of the format."""
        stripped = text.lstrip()
        if not stripped:
            return None
        return len(text) - len(stripped) if stripped[0] in brackets else BROKEN

    return find


def named_head(opening: str, array: str = "") -> Head:
    """Returns a head function: a name, then one of the texts `opening` that ends with a bracket.

    `array` is a bracket that may begin the call without a name.
    """
    choices = opening.split()

    def find(text: str) -> int | None:
        """Head function of the format."""
        stripped = text.lstrip()
        skipped = len(text) - len(stripped)
        if not stripped:
            return None
        if array and stripped[0] == array:
            return skipped
        name = NAME.match(stripped)
        if name is None or name.end() > MAX_NAME_CHARACTERS:
            return BROKEN
        rest = stripped[name.end() :].lstrip()
        for choice in choices:
            if rest.startswith(choice):
                return len(text) - len(rest) + len(choice) - 1
        return None if any(choice.startswith(rest) for choice in choices) else BROKEN

    return find


HERMES = ToolFormat(
    "hermes",
    ("<tool_call>",),
    ("</tool_call>",),
    head=bracket_head("{["),
    layout=Layout(before="\n", after="\n</tool_call>", between_blocks="\n"),
)
GRANITE = ToolFormat(
    "granite3",
    ("<|tool_call|>", "<tool_call>"),
    ("</tool_call>",),
    head=bracket_head("[{"),
    layout=ARRAY,
)
PHI4 = ToolFormat(
    "phi4",
    ("<|tool_call|>", "functools"),
    ("<|/tool_call|>",),
    head=bracket_head("[{"),
    layout=Layout(before="[", after="]<|/tool_call|>", between_calls=", "),
)
MISTRAL = ToolFormat(
    "mistral_v3",
    ("[TOOL_CALLS]",),
    marks=("[ARGS]",),
    head=named_head("[ARGS]{ {", array="["),
    layout=ARRAY,
    id_length=9,
)
OLMO = ToolFormat(
    "olmo",
    ("<function_calls>",),
    ("</function_calls>",),
    is_repeated=True,
    is_python=True,
    head=named_head("(", array="["),
    read=python_calls,
)
LFM2 = ToolFormat(
    "lfm2",
    ("<|tool_call_start|>",),
    ("<|tool_call_end|>",),
    is_python=True,
    head=bracket_head("["),
    read=python_calls,
)
LLAMA3 = ToolFormat(
    "llama3",
    ("<|python_tag|>",),
    starters="{",
    separators=";",
    is_repeated=True,
    head=bracket_head("{"),
    layout=Layout('{"name": "NAME", "parameters": ARGUMENTS}', between_calls="; ", has_mark=False),
)
JSON = ToolFormat(
    "json",
    starters="{[",
    separators=";",
    is_repeated=True,
    head=bracket_head("{["),
    layout=Layout(between_calls="; ", has_mark=False),
)

# The format of a model is the first one whose text is in its chat template. The last row fits any
# template: it is the plain JSON that templates ask for which define no marks.
TABLE: tuple[tuple[str, ToolFormat], ...] = (
    ("[TOOL_CALLS]", MISTRAL),
    ("<function_calls>", OLMO),
    ("<|tool_call_start|>", LFM2),
    ("<|tool|>", PHI4),
    ("<|tool_call|>", GRANITE),
    ("<tool_call>", HERMES),
    ("<|python_tag|>", LLAMA3),
    ("<|start_header_id|>", LLAMA3),
    ("", JSON),
)


def tool_format_of(tokenizer: Any) -> ToolFormat | None:  # Any: transformers is untyped here
    """Returns the format in which a model writes tool calls, or None without a chat template.

    A `response_template` of the tokenizer goes before the table.
    """
    text = template_text(getattr(tokenizer, "chat_template", None))
    if not text:
        return None
    declared = declared_format(getattr(tokenizer, "response_template", None))
    return declared or next(tool_format for sign, tool_format in TABLE if sign in text)


def declared_format(response_template: Any) -> ToolFormat | None:  # Any: JSON of the model
    """Returns the format that a `response_template` of transformers declares, if it is a known kind.

    The marks must be literal texts. Regexes of a model are never run, because they may take
    exponential time.
    """
    try:
        declared = response_template["fields"]["tool_calls"]
        begins, ends = _literals(declared["open"]), _literals(declared.get("close", []))
        content = declared.get("content")
    except (TypeError, KeyError, AttributeError):
        return None
    if not begins or "" in (*begins, *ends) or content not in ("json", "python-call-list"):
        return None
    if content == "json":
        return ToolFormat("declared", begins, ends, head=bracket_head("{["))
    return replace(LFM2, name="declared", begins=begins, ends=ends)


def _literals(value: Any) -> tuple[str, ...]:  # Any: JSON of the model
    return (value,) if isinstance(value, str) else tuple(str(text) for text in value)
