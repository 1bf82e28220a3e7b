"""Properties of a chat template, found in its text. The template is not run."""

import re
from typing import Any

TOOLS = re.compile(r"\btools\b")
# Templates like that of Phi-4-mini read the tools from the system message.
TOOLS_OF_MESSAGE = re.compile(r"""\bmessage(?:\.tools\b|\[['"]tools['"]\])""")

# transformers is untyped here: a template is a text, several by name, or absent
Template = Any


def template_text(template: Template) -> str:
    """Returns the text of all chat templates of a tokenizer."""
    if isinstance(template, dict):
        return "\n".join(str(text) for text in template.values())
    return str(template or "")


def takes_tools(template: Template) -> bool:
    """Returns whether the chat template of a tokenizer shows tools to the model."""
    if isinstance(template, dict):
        return "tool_use" in template or takes_tools(template.get("default"))
    return TOOLS.search(template_text(template)) is not None


def takes_tools_in_message(template: Template) -> bool:
    """Returns whether a chat template reads tools from the field `tools` of the system message."""
    return TOOLS_OF_MESSAGE.search(template_text(template)) is not None
