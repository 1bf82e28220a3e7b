"""Parses the complete text of tool calls, in JSON or in Python syntax."""

import ast
import json
from collections.abc import Collection
from typing import Any, NamedTuple

Json = Any  # Any: JSON of the model


class Call(NamedTuple):
    """Name of the called tool, and its arguments as the text of a JSON object."""

    name: str
    arguments: str


class NotACall(Exception):
    """The text is not a call of a known tool."""


def json_calls(head: str, body: str, names: Collection[str]) -> tuple[Call, ...]:
    """Returns the calls of a JSON object, or of an array of objects.

    An object has a `name`, and `arguments` or `parameters`. If `head` is not empty, it is the name,
    and the object holds the arguments only. Raises NotACall.
    """
    value = _parsed_json(body)
    if head:
        return (_call(head, value, names),)
    calls = []
    for entry in value if isinstance(value, list) else [value]:
        if not isinstance(entry, dict):
            raise NotACall
        arguments = entry.get("arguments", entry.get("parameters"))
        calls.append(_call(entry.get("name"), arguments, names))
    if not calls:
        raise NotACall
    return tuple(calls)


def python_calls(head: str, body: str, names: Collection[str]) -> tuple[Call, ...]:
    """Returns the calls of a Python list `[f(a=1), g()]`, or of one call whose name is `head`.

    Arguments are literals with keywords. `true`, `false` and `null` are accepted too. Raises
    NotACall.
    """
    try:
        tree = ast.parse(head + body, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise NotACall from None
    nodes = tree.elts if isinstance(tree, ast.List) else [tree]
    if not nodes:
        raise NotACall
    return tuple(_python_call(node, names) for node in nodes)


def _python_call(node: ast.expr, names: Collection[str]) -> Call:
    if not isinstance(node, ast.Call) or node.args:
        raise NotACall
    try:
        arguments = {
            keyword.arg: ast.literal_eval(_with_python_names(keyword.value))
            for keyword in node.keywords
            if keyword.arg is not None
        }
        name = ast.unparse(node.func)
    except (ValueError, TypeError, RecursionError, MemoryError):
        raise NotACall from None
    if len(arguments) < len(node.keywords):
        raise NotACall  # a repeated keyword, or ** with a dictionary
    return _call(name, arguments, names)


class _PythonNames(ast.NodeTransformer):
    constants = {"true": True, "false": False, "null": None}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in self.constants:
            return ast.Constant(self.constants[node.id])
        return node


def _with_python_names(node: ast.expr) -> ast.expr:
    changed: ast.expr = _PythonNames().visit(node)
    return changed


def _call(name: Json, arguments: Json, names: Collection[str]) -> Call:
    if isinstance(arguments, str):  # some models encode the arguments twice
        arguments = _parsed_json(arguments or "{}")
    if arguments is None:
        arguments = {}
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        raise NotACall
    return Call(name, json_text(arguments))


def json_text(value: Json) -> str:
    """Returns the text of a JSON value. Raises NotACall if it is not a JSON value."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        if not _is_encodable(text):
            text = json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        raise NotACall from None
    return text


def _is_encodable(text: str) -> bool:
    """Returns False for text with lone surrogates, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parsed_json(text: str) -> Json:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        raise NotACall from None
