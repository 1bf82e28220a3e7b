"""Converts pydantic's validation errors into a BadRequest that names the invalid parameter."""

from collections.abc import Sequence
from typing import Any

from app.errors import BadRequest

Detail = dict[str, Any]  # Any: pydantic's description of an error has arbitrary fields
VALUE_FAULTS_SAY = "Value error, "


def bad_request(details: Sequence[Detail], body: object) -> BadRequest:
    """Returns the error for the first invalid parameter of the request."""
    first = details[0]
    param = param_path(first, body)
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "unexpected end of input")
        return BadRequest(f"the body is not valid JSON: {reason}", "invalid_json")
    if first["type"] == "missing":
        what = f"missing required parameter: {param}" if param else "the request has no JSON body"
        return BadRequest(what, "missing_required_parameter", param or None)
    if first["type"] == "extra_forbidden":
        return BadRequest(f"unknown parameter: {param}", "unknown_parameter", param)
    same_place = [detail for detail in details if param_path(detail, body) == param]
    reasons = dict.fromkeys(
        str(d["msg"]).removeprefix(VALUE_FAULTS_SAY).removeprefix("Input ") for d in same_place
    )
    return BadRequest(
        f"invalid value for {param or 'the body'}: {', or '.join(reasons)}", param=param or None
    )


def param_path(detail: Detail, body: object) -> str:
    """Returns the path of the invalid parameter in the body, for example `a.b[0].c`.

    pydantic's locations also contain the names of union branches, which are left out.
    """
    source, *steps = detail["loc"]
    if source != "body":
        return str(steps[0]) if steps else str(source)
    path, here = "", body
    for number, step in enumerate(steps, 1):
        is_last = number == len(steps)
        if isinstance(here, dict) and step in here:
            here, path = here[step], f"{path}.{step}" if path else str(step)
        elif isinstance(here, list) and isinstance(step, int) and step < len(here):
            here, path = here[step], f"{path}[{step}]"
        elif is_last and detail["type"] in {"missing", "extra_forbidden"}:
            path = f"{path}.{step}" if path else str(step)
    return path
