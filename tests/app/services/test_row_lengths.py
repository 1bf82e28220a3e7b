"""The longest rows of a file are found and counted in a process of its own, within a bound on memory."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from app.services import row_lengths
from app.services.row_lengths import CheckResult, LengthCheck, Reader, VocabularyCheck, ask
from app.settings import Settings
from app.storage import store


def test_the_longest_rows_come_first_with_their_lines(settings_env: Callable[..., Settings]) -> None:
    with store().writer("files/rows") as file:
        file.write(b"".join(b"x" * size + b"\n" for size in (5, 50, 20, 50, 1)))
    found = row_lengths.longest_rows("files/rows", over_bytes=15)
    assert [(size, line_number) for size, line_number, _ in found] == [(51, 4), (51, 2), (21, 3)]


def test_only_so_many_bytes_of_the_longest_rows_are_read(
    settings_env: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_lengths, "MAX_BYTES_COUNTED", 100)
    with store().writer("files/rows") as file:
        file.write(b"".join(b"x" * size + b"\n" for size in (5, 50, 40, 50, 1)))
    rows = row_lengths.longest_rows("files/rows", over_bytes=15)
    assert [(line_number, line) for _, line_number, line in rows] == [(4, b"x" * 50 + b"\n")]


def test_a_row_that_is_too_long_is_found_by_another_process(
    settings_env: Callable[..., Settings], tiny_llama_dir: Path
) -> None:
    store().put_folder(tiny_llama_dir, "models/tiny")
    with store().writer("files/rows") as file:
        for text in ("short", "long " * 100, "longer " * 12):
            file.write(json.dumps({"text": text}).encode() + b"\n")
    check = LengthCheck(
        store_key="files/rows",
        over_bytes=20,
        max_tokens=50,
        is_answered=False,
        readers=(Reader("models/tiny", "causal"),),
    )
    result = ask(check)
    assert (result.line, (result.num_tokens or 0) > 50) == (2, True)
    assert ask(check.model_copy(update={"max_tokens": 10_000})) == CheckResult()
    assert ask(check.model_copy(update={"store_key": "files/gone"})) == CheckResult(is_lost=True)
    assert (ask(VocabularyCheck(model_key="models/tiny")).num_tokens or 0) > 100
