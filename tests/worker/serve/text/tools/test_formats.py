"""The format of a model is chosen from its chat template."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.tool_model import TOOL_TEMPLATE
from worker.models.chat_templates import takes_tools
from worker.serve.text.tools import formats
from worker.serve.text.tools.formats import ToolFormat, declared_format, tool_format_of
from worker.serve.text.tools.parser import ToolParser

# The parts of published chat templates that show tools and write calls.
QWEN = '{% if tools %}{{ tools }}<tool_call>\n{"name": <function-name>}\n</tool_call>{% endif %}'
LLAMA = "<|start_header_id|>{% if tools is not none %}{{ tools }}{% endif %}<|python_tag|>"
MISTRAL = "[AVAILABLE_TOOLS]{{ tools }}[/AVAILABLE_TOOLS][TOOL_CALLS]"
GRANITE = "{{ tools }}<|tool_call|>"
PHI4 = "<|tool|>{{ message['tools'] }}<|/tool|>"
OLMO = "{{ tools }}<function_calls>"
LFM2 = "{{ tools }}<|tool_call_start|>"
PLAIN = "Answer with JSON: {{ tools }}"


@pytest.mark.parametrize(
    ("template", "tool_format"),
    [
        (TOOL_TEMPLATE, formats.HERMES),
        (QWEN, formats.HERMES),
        (LLAMA, formats.LLAMA3),
        (MISTRAL, formats.MISTRAL),
        (GRANITE, formats.GRANITE),
        (PHI4, formats.PHI4),
        (OLMO, formats.OLMO),
        (LFM2, formats.LFM2),
        (PLAIN, formats.JSON),
        ({"default": "plain", "tool_use": QWEN}, formats.HERMES),
    ],
)
def test_templates_name_their_format(template: Any, tool_format: ToolFormat) -> None:
    assert tool_format_of(SimpleNamespace(chat_template=template)) == tool_format
    assert takes_tools(template)


def test_a_template_without_tools_takes_none() -> None:
    assert not takes_tools("{% for message in messages %}{{ message.content }}{% endfor %}")
    assert not takes_tools("{{ stools }}")
    assert not takes_tools({"default": "plain"})
    assert not takes_tools(None)
    assert tool_format_of(SimpleNamespace(chat_template=None)) is None


def test_a_declared_format_goes_before_the_template() -> None:
    declared = {
        "start_anchor": "x",
        "fields": {
            "content": {"content": "text"},
            "tool_calls": {"open": ["<a>", "<b>"], "close": "</a>", "content": "json"},
        },
    }
    tokenizer = SimpleNamespace(chat_template=QWEN, response_template=declared)
    tool_format = tool_format_of(tokenizer)
    assert tool_format is not None
    parser = ToolParser(tool_format, {"f"}, is_parallel=True)
    parsed = parser.feed('Hm <b>{"name": "f", "arguments": {}}</a>')
    assert parsed.text == "Hm "
    assert [call.name for call in parsed.calls] == ["f"]


@pytest.mark.parametrize(
    "tool_calls",
    [
        {"open_pattern": "(a+)+b", "content": "json"},
        {"open": "<a>", "content": "xml-inline"},
        {"open": "", "content": "json"},
        {"open": 5, "content": "json"},
        None,
    ],
)
def test_a_declared_format_of_another_kind_is_not_used(tool_calls: Any) -> None:
    assert declared_format({"fields": {"tool_calls": tool_calls}}) is None
