"""Error codes that the source of the service and of the workers contains."""

import ast
import inspect
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import app.errors
import worker.errors
import worker.serve.errors
from app.errors import StillhouseError
from app.services.webhooks import address_guard
from tests.documentation import ROOT

JOB_ERRORS = ("JobFailure", "ErrorLine")


class Reply(NamedTuple):
    """Status and type of a response that has a code."""

    status: int
    type: str


TYPES = {400: "invalid_request_error", 500: "server_error", 503: "server_error"}


def classes(module: ModuleType) -> Iterator[type]:
    """Yields the classes that a module defines."""
    for _, found in inspect.getmembers(module, inspect.isclass):
        if found.__module__ == module.__name__:
            yield found


def constants(tree: ast.Module) -> dict[str, str]:
    """Returns the text constants of a module."""
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


@cache
def trees(*folders: str) -> list[ast.Module]:
    """Returns the parsed modules of the folders."""
    return [
        ast.parse(path.read_text())
        for folder in folders
        for path in sorted(Path(ROOT / folder).rglob("*.py"))
    ]


def called_name(call: ast.Call) -> str:
    """Returns the last part of the name of the function or class that is called."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def code_arguments(folders: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yields the names of called functions with the codes that are passed as text or constant.

    The code is the argument `code`. For an error of `app.errors` and for a function with a
    parameter `code`, it can also be positional. Defaults of parameters are codes of their function.
    """
    parsed = trees(*folders)
    positions = dict.fromkeys(vars(app.errors), 1)
    for tree in parsed:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                names = [argument.arg for argument in node.args.args]
                if "code" in names:
                    positions[node.name] = names.index("code")
                yield from ((node.name, code) for code in default_codes(node))
    for tree in parsed:
        known = constants(tree)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = called_name(node)
            value = next((word.value for word in node.keywords if word.arg == "code"), None)
            if value is None and len(node.args) > positions.get(name, 99):
                value = node.args[positions[name]]
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield name, value.value
            elif isinstance(value, ast.Name) and value.id in known:
                yield name, known[value.id]


def default_codes(function: ast.FunctionDef) -> Iterator[str]:
    """Yields the default of the parameter `code`."""
    arguments = function.args
    defaults: list[tuple[ast.arg, ast.expr | None]] = [
        *zip(reversed(arguments.args), reversed(arguments.defaults), strict=False),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    for argument, value in defaults:
        if argument.arg == "code" and isinstance(value, ast.Constant) and value.value:
            yield str(value.value)


def response_codes() -> dict[str, set[Reply]]:
    """Returns the codes of the error responses of the API, with their statuses and types."""
    found: dict[str, set[Reply]] = defaultdict(set)
    errors: dict[str, type[StillhouseError]] = {}
    for error in (*classes(app.errors), *classes(address_guard)):
        if issubclass(error, StillhouseError):
            errors[error.__name__] = error
            found[error.code].add(Reply(error.status, error.type))
    for error in classes(worker.serve.errors):
        if issubclass(error, worker.serve.errors.ServeError):
            kind = TYPES.get(error.status, "server_error")
            found[error.code].add(Reply(error.status, kind))
    for name, code in code_arguments(("app",)):
        if name not in JOB_ERRORS:
            known = errors.get(name, app.errors.BadRequest)
            found[code].add(Reply(known.status, known.type))
    found["draining"].add(Reply(503, "server_error"))  # also sent by a serve worker
    found["method_not_allowed"] = {Reply(405, "invalid_request_error")}
    return found


def job_codes() -> dict[str, str | None]:
    """Returns the codes of failed jobs, with the docstring of their class if they have one."""
    found: dict[str, str | None] = {}
    for error in classes(worker.errors):
        if issubclass(error, worker.errors.WorkerError) and "code" in vars(error):
            text = inspect.cleandoc(error.__doc__ or "").split("\n\n")[0]
            found[error.code] = None if error.code in found else " ".join(text.split())
    for name, code in code_arguments(("app", "worker")):
        if name in JOB_ERRORS:
            found.setdefault(code, None)
    for tree in trees("app", "worker"):
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.keyword)
                and node.arg == "error_code"
                and isinstance(node.value, ast.Constant)
            ):
                found.setdefault(str(node.value.value), None)
    return found


def response_docstrings() -> dict[str, str]:
    """Returns the first paragraph of the only class that has a code, for each such code."""
    texts: dict[str, list[str]] = defaultdict(list)
    for module in (app.errors, address_guard, worker.serve.errors):
        for error in classes(module):
            code = vars(error).get("code")
            if code is not None and issubclass(error, Exception):
                paragraph = inspect.cleandoc(error.__doc__ or "").split("\n\n")[0]
                texts[code].append(" ".join(paragraph.split()))
    return {code: found[0] for code, found in texts.items() if len(found) == 1}
