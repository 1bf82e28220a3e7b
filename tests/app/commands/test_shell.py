"""Output of the commands: texts of a service cannot control a terminal."""

import json

import pytest
import typer

from app.commands.cli import expected_message
from app.commands.remote.output import show_json
from app.commands.shell import fail, note, tell

HOSTILE = "a\x1b]0;title\x07b\x9bc\ud800\td"
ESCAPED = "a\\u001b]0;title\\u0007b\\u009bc\\ud800\td"


def test_messages_and_errors_escape_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tell(HOSTILE)
    note(HOSTILE)
    with pytest.raises(typer.Exit):
        fail(HOSTILE)
    out, err = capsys.readouterr()
    assert out.expandtabs().strip() == ESCAPED.expandtabs()
    shown, failed = err.splitlines()
    assert shown.expandtabs() == ESCAPED.expandtabs()
    assert failed == f"stillhouse: {ESCAPED}"


def test_json_with_control_characters_is_still_the_same_document(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show_json({"text": HOSTILE})
    out = capsys.readouterr().out
    assert "\x9b" not in out
    assert json.loads(out) == {"text": HOSTILE}


def test_an_error_of_the_file_system_is_one_line() -> None:
    assert expected_message(PermissionError(13, "Permission denied", "x")) == "x: Permission denied"
    assert expected_message(OSError(28, "No space left on device")) == "No space left on device"
    assert expected_message(KeyError("bug")) is None
