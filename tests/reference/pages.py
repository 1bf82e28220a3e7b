"""Pages of docs/reference, made from the source of the service."""

import ast
import inspect
import json
import re
from collections.abc import Iterator
from typing import Any, Final, get_args

from app.contracts import distillation
from app.contracts.distillation import Block
from app.db.job_states import Level
from app.db.webhooks.outbox import EVENT_TYPES
from app.services.batch.batch_output import NEVER_RUN
from tests.reference.codes import (
    called_name,
    job_codes,
    response_codes,
    response_docstrings,
    trees,
)
from tests.reference.meanings import EVENTS, JOBS, RESPONSES
from tests.reference.option_meanings import OPTIONS

NOTE: Final = "<!-- Written by `python -m tests.reference`. Do not edit. -->"
Json = dict[str, Any]  # Any: JSON schemas


class Outdated(Exception):
    """A text is missing, or belongs to nothing in the source."""


def pages() -> dict[str, str]:
    """Returns the text of each page by its path below docs/. Raises Outdated."""
    return {
        "reference/errors.md": error_page(),
        "reference/events.md": event_page(),
        "reference/job-options.md": option_page(),
    }


def demand_equal(texts: set[str], source: set[str], place: str) -> None:
    """Raises Outdated unless there are texts for exactly the names in the source."""
    if texts != source:
        missing, unknown = sorted(source - texts), sorted(texts - source)
        raise Outdated(f"{place}: without a text {missing}; not in the source {unknown}")


def table(*rows: tuple[str, ...]) -> str:
    """Returns a Markdown table; the first row is its head."""
    head, *others = rows
    lines = [head, ("---",) * len(head), *others]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(title: str, *parts: str) -> str:
    """Returns a page with a note that it is generated."""
    return "\n\n".join([NOTE, f"# {title}", *parts]) + "\n"


def error_page() -> str:
    """Returns docs/reference/errors.md."""
    codes, texts = response_codes(), response_docstrings()
    texts = {code: text for code, text in texts.items() if code not in RESPONSES}
    demand_equal({*RESPONSES, *texts}, set(codes), "RESPONSES in tests/reference/meanings.py")
    texts |= RESPONSES
    jobs = job_codes()
    demand_equal(
        set(JOBS), {code for code in jobs if jobs[code] is None or code in JOBS}, "JOBS there"
    )
    responses = [
        (
            f"`{code}`",
            ", ".join(str(status) for status in sorted({reply.status for reply in replies})),
            ", ".join(f"`{kind}`" for kind in sorted({reply.type for reply in replies})),
            texts[code],
        )
        for code, replies in sorted(codes.items())
    ]
    return page(
        "Errors",
        "Every error has the body of an OpenAI error. `code` is stable, and `message` says what to "
        "do next. Programs should read `code` and never `message`.",
        f"```json\n{json.dumps({'error': {'message': '...', 'type': 'invalid_request_error', 'param': 'model', 'code': 'model_not_found'}})}\n```",
        "The header `X-Should-Retry` says whether a retry is useful, where the status alone does not. "
        "Responses with 429 and 503 have `Retry-After`. The `openai` client obeys both.",
        "## Responses",
        table(("code", "status", "type", "meaning"), *responses),
        "## Failed jobs",
        "`error.code` of a job has one of these values.",
        table(
            ("code", "meaning"),
            *((f"`{code}`", JOBS.get(code) or str(jobs[code])) for code in sorted(jobs)),
        ),
        "## Lines of a batch",
        "The error file of a batch has the codes of the responses above, and these:",
        table(
            ("code", "meaning"),
            *sorted(
                (f"`{code}`", f"{text[0].upper()}{text[1:]}.") for code, text in NEVER_RUN.values()
            ),
        ),
    )


def event_types() -> set[str]:
    """Returns the types of job events that the source adds."""
    types = set()
    for tree in trees("app", "worker"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and called_name(node) == "add_event":
                value = next((word.value for word in node.keywords if word.arg == "type"), None)
                types.add(str(value.value) if isinstance(value, ast.Constant) else "message")
    return types


def event_page() -> str:
    """Returns docs/reference/events.md."""
    demand_equal(set(EVENTS), event_types(), "EVENTS in tests/reference/meanings.py")
    levels = ", ".join(f"`{level}`" for level in get_args(Level))
    return page(
        "Events",
        "## Events of a job",
        "`GET /v1/fine_tuning/jobs/{id}/events` lists the events of a job, newest first. With "
        "`?stream=true` it sends them as server-sent events while they happen. Each event has `id`, "
        f"`created_at`, `level`, `type`, `message`, `data`, and `seq`. `level` is one of {levels}. "
        "`seq` grows with each event of a job.",
        table(
            ("type", "meaning", "`data`"),
            *((f"`{name}`", *EVENTS[name]) for name in sorted(EVENTS)),
        ),
        "## Webhook events",
        "[Webhooks](../webhooks.md) have these types. `data` has the `id` of the job or batch and "
        "nothing else.",
        table(("type",), *((f"`{name}`",) for name in EVENT_TYPES)),
    )


def option_page() -> str:
    """Returns docs/reference/job-options.md."""
    blocks = {
        name: found
        for name, found in vars(distillation).items()
        if inspect.isclass(found) and issubclass(found, Block) and found is not Block
    }
    demand_equal(set(OPTIONS), set(blocks), "OPTIONS in tests/reference/option_meanings.py")
    schema = distillation.Distillation.model_json_schema()
    places = dict(block_places(schema, "Distillation", ""))
    parts = []
    for name, place in places.items():
        block = blocks[name]
        demand_equal(set(OPTIONS[name]), set(block.model_fields), f"OPTIONS[{name!r}]")
        about, details = split_docstring(inspect.cleandoc(block.__doc__ or ""))
        fields = definition(schema, name)["properties"]
        rows = [
            (
                f"`{field}`",
                type_of(fields[field], places),
                default_of(fields[field], is_required=block.model_fields[field].is_required()),
                " ".join(filter(None, [OPTIONS[name][field], details.get(field, "")])),
            )
            for field in block.model_fields
        ]
        parts += [
            f"## {heading(place)}",
            about,
            table(("name", "type", "default", "meaning"), *rows),
        ]
    return page(
        "Options of a job",
        "These are the fields of `method.distillation` in `POST /v1/fine_tuning/jobs`. Unknown fields "
        "are refused. [Jobs](../jobs.md#options) explains which values are chosen for `null` and "
        "`auto`, which defaults depend on other options, and how the options work together.",
        *parts,
    )


def heading(place: str) -> str:
    """Returns the heading of a block; its anchor is the place without dots."""
    return f"`{place}`" if place else "`method.distillation`"


def definition(schema: Json, name: str) -> Json:
    """Returns the JSON schema of a block."""
    found: Json = schema if name == "Distillation" else schema["$defs"][name]
    return found


def block_places(schema: Json, name: str, place: str) -> Iterator[tuple[str, str]]:
    """Yields the blocks with the path of the field that holds them, outer blocks first."""
    yield name, place
    for field, value in definition(schema, name)["properties"].items():
        for option in value.get("anyOf", [value]):
            if "$ref" in option:
                inner = option["$ref"].rpartition("/")[2]
                yield from block_places(schema, inner, f"{place}.{field}".lstrip("."))


def split_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Returns the paragraphs of a docstring, and its entries per field as one line of text each."""
    entries: dict[str, list[str]] = {}
    about: list[str] = []
    current: list[str] | None = None
    for line in text.replace("docs/jobs.md", "[Jobs](../jobs.md#options)").splitlines():
        entry = re.match(r"([a-z_]+):(?: (.*))?$", line)
        if entry:
            current = entries[entry[1]] = [entry[2] or ""]
        elif current is not None and line.startswith("    "):
            value = re.match(r"    ([a-z_]+): (.*)", line)
            current.append(f"`{value[1]}`: {value[2]}" if value else line.strip())
        else:
            current = None
            about.append(line)
    described = re.sub(r"\n{3,}", "\n\n", "\n".join(about)).strip()
    return described, {name: " ".join(filter(None, lines)) for name, lines in entries.items()}


def type_of(field: Json, places: dict[str, str]) -> str:
    """Returns the type of a field with its bounds, in words."""
    if "anyOf" in field:
        return " or ".join(type_of(option, places) for option in field["anyOf"])
    if "$ref" in field:
        place = places[field["$ref"].rpartition("/")[2]]
        return f"[`{place}`](#{place.replace('.', '')})"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if field["type"] == "array":
        items = field.get("items") or {"type": "integer"}
        least, most = field.get("minItems"), field.get("maxItems")
        length = f" of {most}" if least == most else f" of {least} to {most}"
        if most is None:
            length = ""
        return f"list{length or ' of'} {type_of(items, places)}"
    low, high = field.get("minimum"), field.get("maximum")
    above, below = field.get("exclusiveMinimum"), field.get("exclusiveMaximum")
    bounds = [
        f"from {low:g}" if low is not None else "",
        f"above {above:g}" if above is not None else "",
        f"to {high:g}" if high is not None and high < 1e6 else "",
        f"to {high}" if high is not None and high >= 1e6 else "",
        f"below {below:g}" if below is not None else "",
    ]
    return " ".join(filter(None, [str(field["type"]), *bounds]))


def default_of(field: Json, *, is_required: bool) -> str:
    """Returns the default of a field as JSON; a block that is an object has its own defaults."""
    if is_required:
        return "required"
    value = field.get("default")
    return "see there" if isinstance(value, dict) else f"`{json.dumps(value)}`"
