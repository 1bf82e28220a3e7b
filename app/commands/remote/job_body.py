"""Request body of `stillhouse jobs create`, made from its options."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from app.commands.shell import Json

Labels = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="A label; can be repeated.")
]


@dataclass(frozen=True)
class JobOptions:
    """Options of `stillhouse jobs create` that describe the job, as they were given."""

    model: str | None
    teacher: str | None
    suffix: str | None
    layers: str | None
    epochs: int | None
    seed: int | None
    metadata: Sequence[str]
    is_supervised: bool
    method_json: str | None


def job_body(options: JobOptions) -> Json:
    """Returns the body of the request, without the files. Raises typer.BadParameter."""
    name = "supervised" if options.is_supervised else "distillation"
    block = _method_block(options.method_json, name)
    model = options.model
    if options.is_supervised:
        _demand_supervised(options)
    else:
        teacher = options.teacher or block.get("teacher") or model
        model = model or teacher
        if teacher is None:
            raise typer.BadParameter("give --teacher, --model or both")
        block = _with(block, ("teacher",), teacher, "--teacher")
        if options.layers is not None:
            block = _with(block, ("student", "num_layers"), _counts(options.layers), "--layers")
    if options.epochs is not None:
        block = _with(block, ("hyperparameters", "n_epochs"), options.epochs, "--epochs")
    body: Json = {"model": model, "method": {"type": name, name: block}}
    body |= {"metadata": pairs_of(options.metadata)} if options.metadata else {}
    given = {"suffix": options.suffix, "seed": options.seed}
    return body | {key: value for key, value in given.items() if value is not None}


def _demand_supervised(options: JobOptions) -> None:
    for name, value in (("--teacher", options.teacher), ("--layers", options.layers)):
        if value is not None:
            raise typer.BadParameter(f"a supervised job has no {name}; leave it out")
    if options.model is None:
        raise typer.BadParameter("a supervised job needs --model")


def pairs_of(pairs: Sequence[str]) -> dict[str, str]:
    """Returns the labels of options such as --metadata team=x. Raises typer.BadParameter."""
    for pair in pairs:
        if "=" not in pair:
            raise typer.BadParameter(f"{pair!r} is not a label; use the form key=value")
    return {key: value for key, _, value in (pair.partition("=") for pair in pairs)}


def _method_block(text: str | None, name: str) -> Json:
    """Returns the options of --method-json: those of `method.<name>`, or of a complete `method`."""
    if text is None:
        return {}
    try:
        document = json.loads(Path(text[1:]).read_text() if text.startswith("@") else text)
    except OSError as error:
        raise typer.BadParameter(f"cannot read {text[1:]!r}: {error.strerror}") from error
    except ValueError as error:
        raise typer.BadParameter(
            f"--method-json is not JSON ({error}); give an object, or @FILE with one"
        ) from error
    if isinstance(document, dict) and "type" in document:
        if document["type"] != name:
            raise typer.BadParameter(
                f"--method-json has the type {document['type']!r}, but the job is of the type {name!r}; "
                "--supervised chooses between them"
            )
        document = document.get(name) or {}
    if not isinstance(document, dict):
        raise typer.BadParameter("--method-json must be a JSON object")
    return document


def _with(block: Json, path: tuple[str, ...], value: object, option: str) -> Json:
    """Returns the block with the value at the path. Raises typer.BadParameter if it has another."""
    name, *rest = path
    if rest:
        inner = block.get(name) or {}
        if not isinstance(inner, dict):
            raise typer.BadParameter(f"{name!r} in --method-json must be an object")
        return {**block, name: _with(inner, tuple(rest), value, option)}
    if block.get(name, value) != value:
        raise typer.BadParameter(f"{option} and --method-json give different values for {name!r}")
    return {**block, name: value}


def _counts(text: str) -> int | list[int]:
    """Returns the number of layers, or the list of numbers for a ladder of students."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"--layers is {text!r}; give a number such as 8, or several such as 12,8,4"
        ) from None
    return counts[0] if len(counts) == 1 else counts
