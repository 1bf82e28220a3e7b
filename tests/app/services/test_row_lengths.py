"""The longest rows of a file are found and counted in a process of its own, within a bound on memory."""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from app.errors import BadRequest, TooManyRequests
from app.services import row_lengths
from app.services.row_lengths import CheckResult, LengthCheck, Reader, VocabularyCheck, ask
from app.settings import Settings
from app.storage import store
from tests.waiting import wait_for

CHECK = LengthCheck(
    store_key="files/rows",
    over_bytes=20,
    max_tokens=50,
    is_answered=False,
    readers=(Reader("m", "causal"),),
)


@pytest.fixture
def pipe(settings_env: Callable[..., Settings]) -> Iterator[Path]:
    """A file of the store whose readers wait until the test ends."""
    path = Path(settings_env().store_root()) / "files/rows"
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    yield path
    path.unlink()


def checkers() -> list[psutil.Process]:
    """Processes that read the pipe."""
    return [
        child
        for child in psutil.Process().children()
        if "app.services.row_lengths" in child.cmdline()
        and "app.parent_death" not in child.cmdline()
    ]


def release(pipe: Path, checks: list[Future[CheckResult]]) -> None:
    """Lets the readers of the pipe go on and waits for their end. They fail, as nobody can seek in a pipe."""

    def open_and_close() -> bool:
        with suppress(OSError):  # no reader yet
            os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        return all(check.done() for check in checks)

    wait_for(open_and_close, 60, "the checks do not end")


def test_the_longest_rows_come_first_with_their_lines(
    settings_env: Callable[..., Settings],
) -> None:
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
    result = ask(check, "p")
    assert (result.line, (result.num_tokens or 0) > 50) == (2, True)
    assert ask(check.model_copy(update={"max_tokens": 10_000}), "p") == CheckResult()
    assert ask(check.model_copy(update={"store_key": "files/gone"}), "p") == CheckResult(
        is_lost=True
    )
    assert (ask(VocabularyCheck(model_key="models/tiny"), "p").num_tokens or 0) > 100


def test_a_project_has_at_most_two_checks_at_a_time_and_others_have_places(pipe: Path) -> None:
    gone = CHECK.model_copy(update={"store_key": "files/gone"})
    with ThreadPoolExecutor(2) as pool:
        checks = [pool.submit(ask, CHECK, "p") for _ in range(2)]
        wait_for(lambda: len(checkers()) == 2, 60, "the checks do not start")
        try:
            with pytest.raises(TooManyRequests, match="2 file checks") as refusal:
                ask(gone, "p")
            assert ask(gone, "q") == CheckResult(is_lost=True)
        finally:
            release(pipe, checks)
    assert refusal.value.retry_after_seconds
    assert ask(gone, "p") == CheckResult(is_lost=True)


def test_a_check_that_takes_too_long_refuses_the_file(
    pipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_lengths, "CHECK_SECONDS", 0.1)
    with pytest.raises(BadRequest, match="shorten") as refusal:
        ask(CHECK, "p", param="training_file")
    assert (refusal.value.code, refusal.value.param) == ("invalid_file", "training_file")


def test_a_check_gets_no_secrets(pipe: Path, settings_env: Callable[..., Settings]) -> None:
    secrets = ("database_url", "redis_url", "key_pepper", "hf_token")
    settings_env(**dict.fromkeys(secrets, "secret-value"))
    with ThreadPoolExecutor(1) as pool:
        checks = [pool.submit(ask, CHECK, "p")]
        wait_for(lambda: len(checkers()) == 1, 60, "the check does not start")
        try:
            environment = checkers()[0].environ()
        finally:
            release(pipe, checks)
    assert "secret-value" not in environment.values()
    assert environment["STILLHOUSE_DATA_DIR"]
