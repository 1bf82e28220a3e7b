from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.json_limits import MAX_CONTAINERS
from app.schemas.batches import BatchRequest
from app.services.batch import batch_input
from app.services.batch.batch_input import body_of, find_faults, numbered_lines
from app.settings import Settings
from app.storage import store


def put(content: bytes) -> str:
    with store().writer("files/lines") as file:
        file.write(content)
    return "files/lines"


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None
)
@given(
    lines=st.lists(
        st.binary(max_size=12).map(lambda raw: raw.replace(b"\n", b"")), min_size=1, max_size=12
    ),
    has_end=st.booleans(),
)
def test_lines_read_in_pieces_are_those_of_the_file(
    settings_env: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    lines: list[bytes],
    has_end: bool,
) -> None:
    monkeypatch.setattr(batch_input, "PIECE_BYTES", 5)
    # a file that ends in an empty line cannot be told from one that ends in a newline
    lines = [
        *lines,
        b"last",
    ]
    key = put(b"\n".join(lines) + (b"\n" if has_end else b""))
    assert list(numbered_lines(key, 100)) == list(enumerate(lines, 1))


def test_a_line_without_an_end_is_not_read_to_its_end(
    settings_env: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_input, "PIECE_BYTES", 10)
    key = put(b"x" * 10_000)
    assert max(len(raw) for _, raw in numbered_lines(key, 20)) <= 40


@pytest.mark.parametrize("rest", [b"", b"\n", b"\nlast", b"\nlast\n"])
def test_a_line_that_is_too_long_counts_as_one_line(
    settings_env: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, rest: bytes
) -> None:
    monkeypatch.setattr(batch_input, "PIECE_BYTES", 10)
    for length in range(21, 60):
        lines = list(numbered_lines(put(b"first\n" + b"x" * length + rest), 20))
        last = [(3, b"last")] if b"last" in rest else []
        assert [lines[0], *lines[2:]] == [(1, b"first"), *last]
        assert len(lines[1][1]) > 20


def test_no_more_faults_are_told_than_anybody_reads(settings_env: Callable[..., Settings]) -> None:
    key = put(b"{}\n" * 1000)
    _, faults, _ = find_faults(
        key, project_id="p", endpoint="/v1/completions", settings=settings_env()
    )
    assert (len(faults), faults[-1].line) == (100, 100)


def test_a_line_of_a_new_batch_beyond_the_limits_is_a_fault(
    settings_env: Callable[..., Settings],
) -> None:
    key = put(b'{"a": [' + b"[]," * MAX_CONTAINERS + b"[]]}\n")
    _, faults, _ = find_faults(
        key, project_id="p", endpoint="/v1/completions", settings=settings_env()
    )
    assert [fault.code for fault in faults] == ["json_too_complex"]


def test_labels_of_a_line_have_no_effect() -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    request = BatchRequest(
        custom_id="a",
        method="POST",
        url="/v1/chat/completions",
        body={**body, "store": "yes", "metadata": {"row": 7}},
    )
    plain = request.model_copy(update={"body": body})
    assert body_of(request, request.url) == body_of(plain, request.url)
