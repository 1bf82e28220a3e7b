"""Grammars that make an answer contain valid tool calls, in the format of the model.

They are Lark grammars of llguidance. A special token is written `<[id]>` there, because it has no
text. Embedded JSON Schemas begin with `%json`.
"""

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from app.contracts.generation import GenerateRequest, Grammar, Tool, ToolUse
from worker.serve.errors import IgnoreEosUnsupported, ToolChoiceUnsupported, ToolsUnsupported
from worker.serve.text.detokenizer import TokenText
from worker.serve.text.tools.formats import Layout, ToolFormat

Json = dict[str, Any]  # Any: a JSON Schema
HEADER = "%llguidance {}\n"
ANY_TEXT = r"/(.|\n)*/"
NO_ARGUMENTS: Json = {"type": "object", "properties": {}, "additionalProperties": False}
# White space as json.dumps writes it, with which models are trained. Models that may write any
# white space often write nothing else.
SPACING: Json = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

Special = tuple[tuple[str, int], ...]  # texts of special tokens, and their ids


def constrained(request: GenerateRequest, text: TokenText) -> GenerateRequest:
    """Returns a request with the grammar of its answers, see `answer_grammar`.

    An answer that must consist of calls has no stop strings and no `stop_token_ids`, which would cut
    a call.

    Raises ToolsUnsupported or IgnoreEosUnsupported.
    """
    grammar = answer_grammar(request, text.tool_format, text.special_tokens)
    if grammar is not None and request.sampling.ignore_eos:
        raise IgnoreEosUnsupported(
            "ignore_eos is not supported with a structured output or enforced tool calls, whose answer must end; leave it out"
        )
    if grammar == request.sampling.grammar:
        return request
    update: dict[str, object] = {"grammar": grammar}
    if request.tool_use is not None and request.tool_use.choice == "required":
        update |= {"stop": (), "stop_token_ids": ()}
    return request.model_copy(update={"sampling": request.sampling.model_copy(update=update)})


def answer_grammar(
    request: GenerateRequest, tool_format: ToolFormat | None, special: Mapping[str, int]
) -> Grammar | None:
    """Returns the grammar of the answers to a request, or None if they are free.

    Tool calls are constrained if one is required or a tool is strict. `special` maps the texts of
    special tokens to their ids. A JSON Schema of the request applies to answers without a call. A
    request with another grammar has its grammar already, because the API refuses tools beside it.

    Raises ToolsUnsupported if the format has no grammar and the request needs one.
    """
    own, tool_use = request.sampling.grammar, request.tool_use
    if tool_use is None or tool_use.choice == "none" or tool_format is None:
        return own
    if tool_format.layout is None:
        _refuse_constraints(tool_use, own)
        return None
    if own is not None and own.kind != "json_schema":
        return own
    marks = tuple(sorted((m, special[m]) for m in tool_format.all_marks if m in special))
    return tool_grammar(tool_use, tool_format, marks, own)


def _refuse_constraints(tool_use: ToolUse, own: Grammar | None) -> None:
    """Raises ToolsUnsupported if a request needs a grammar, for a format without one."""
    subject = "the form in which this model writes tool calls cannot be enforced"
    if tool_use.choice == "required":
        raise ToolChoiceUnsupported(f"{subject}; use tool_choice 'auto'")
    if any(tool.strict for tool in tool_use.tools):
        raise ToolsUnsupported(f"{subject}; leave out strict, or set it to false")
    if own is not None:
        raise ToolsUnsupported(f"{subject}; leave out the tools or {own.param}")


@lru_cache(128)
def tool_grammar(
    tool_use: ToolUse, tool_format: ToolFormat, special: Special = (), own: Grammar | None = None
) -> Grammar | None:
    """Returns the grammar of answers with these tools, or None if answers are free.

    `own` has the JSON Schema of answers without a call.
    """
    assert tool_format.layout is not None, "answer_grammar builds no grammar for such a format"
    if tool_use.choice != "required" and own is None and not any(t.strict for t in tool_use.tools):
        return None
    builder = _Builder(tool_use, tool_format, tool_format.layout, dict(special))
    text = HEADER + "\n".join(builder.rules(None if own is None else own.text)) + "\n"
    return Grammar(kind="lark", text=text, param="tools" if own is None else own.param)


class _Builder:
    """Builder of one grammar. Methods return the right side of rules."""

    def __init__(
        self, tool_use: ToolUse, tool_format: ToolFormat, layout: Layout, special: dict[str, int]
    ) -> None:
        self._tool_use = tool_use
        self._format = tool_format
        self._layout = layout
        self._special = special

    def rules(self, schema: str | None) -> Iterator[str]:
        """Yields the rules of the grammar. The first one is `start`."""
        if self._tool_use.choice == "required":
            yield "start: calls"
        elif schema is not None:
            yield f"start: calls | %json {_with_spacing(json.loads(schema), is_strict=True)}"
        elif self._format.starters:
            brackets = "".join(f"\\{bracket}" for bracket in self._format.starters)
            yield "start: calls | free"
            yield f'free: "" | /\\s+/ | /\\s*[^{brackets}\\s](.|\\n)*/'
        else:
            yield "start: marked* TEXT"
            yield f"TEXT: {ANY_TEXT}"
            yield from self._marked_rules()
        yield f"calls: {self._calls()}"
        yield f"rest: {self._rest()}"
        yield f"call: {' | '.join(f'call_{i}' for i in range(len(self._tool_use.tools)))}"
        for number, tool in enumerate(self._tool_use.tools):
            yield f"call_{number}: {self._call(tool)}"

    def _marked_rules(self) -> Iterator[str]:
        """Yields rules for text up to a mark, and the block of calls after it."""
        names = []
        for number, mark in enumerate(self._format.begins):
            names.append(f"marked_{number}")
            if mark in self._special:
                yield f"marked_{number}: TEXT {self._literal(mark)} rest"
            else:
                # lazy: the shortest text that ends with the mark
                yield f"mark_{number}[lazy]: TEXT {_quoted(mark)}"
                yield f"marked_{number}: mark_{number} rest"
        yield f"marked: {' | '.join(names)}"

    def _calls(self) -> str:
        """Returns one or several blocks."""
        begin = self._literal(self._format.begins[0]) if self._layout.has_mark else ""
        block = f"{begin} rest"
        if not self._tool_use.is_parallel or self._layout.between_blocks is None:
            return block
        return f"{block} ({_quoted(self._layout.between_blocks)} {block})*"

    def _rest(self) -> str:
        """Returns a block without the mark that begins it."""
        calls = "call"
        if self._tool_use.is_parallel and self._layout.between_calls is not None:
            calls = f"call ({_quoted(self._layout.between_calls)} call)*"
        return f"{self._literal(self._layout.before)} {calls} {self._literal(self._layout.after)}"

    def _call(self, tool: Tool) -> str:
        before, _, after = self._layout.call.partition("ARGUMENTS")
        before = before.replace("NAME", tool.name)
        return f"{self._literal(before)} %json {self._arguments(tool)} {self._literal(after)}"

    def _arguments(self, tool: Tool) -> str:
        is_constrained = tool.strict or self._tool_use.choice == "required"
        schema: Json = {"type": "object"}
        if is_constrained:
            schema = NO_ARGUMENTS if tool.parameters is None else json.loads(tool.parameters)
        return _with_spacing(schema, is_strict=tool.strict)

    def _literal(self, text: str) -> str:
        """Returns a text as terminals. A mark that is a special token becomes `<[id]>`."""
        for mark, token in self._special.items():
            if mark in text:
                before, _, after = text.partition(mark)
                return f"{self._literal(before)} <[{token}]> {self._literal(after)}"
        return _quoted(text) if text else ""


def _with_spacing(schema: Json, *, is_strict: bool) -> str:
    """Returns the text of a schema with options for llguidance.

    Without `is_strict`, keywords that cannot be enforced are ignored.
    """
    return json.dumps({**schema, "x-guidance": {**SPACING, "lenient": not is_strict}})


def _quoted(text: str) -> str:
    return json.dumps(text)
