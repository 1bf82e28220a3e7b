import json
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest

from app.settings import get_settings
from app.storage import store

ROW = {"prompt": "What is a still?", "completion": "A vessel."}


def send(
    client: openai.OpenAI, content: bytes, purpose: str = "fine-tune"
) -> openai.types.FileObject:
    return client.files.create(file=("rows.jsonl", content), purpose=purpose)  # type: ignore[arg-type] # wider here


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def stored_files() -> list[Path]:
    root = Path(get_settings().store_root())
    return [path for path in root.rglob("*") if path.is_file()]


def refusal(client: openai.OpenAI, content: bytes) -> openai.BadRequestError:
    with pytest.raises(openai.BadRequestError) as refused:
        send(client, content)
    assert stored_files() == []
    return refused.value


def test_an_upload_is_counted_and_comes_back_byte_for_byte(client: openai.OpenAI) -> None:
    content = lines(ROW, {"prompt": "蒸馏?", "completion": "是"})
    made = send(client, content)
    assert (made.object, made.bytes, made.filename, made.purpose) == (
        "file",
        len(content),
        "rows.jsonl",
        "fine-tune",
    )
    assert (made.model_extra or {})["rows"] == 2
    assert (made.model_extra or {})["format"] == "prompt_completion"
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == content


def test_files_are_listed_in_pages_newest_first(client: openai.OpenAI) -> None:
    ids = [send(client, lines(ROW)).id for _ in range(3)]
    assert [file.id for file in client.files.list(limit=2)] == ids[::-1]
    page = client.files.list(limit=2, order="asc")
    assert [file.id for file in page.data] == ids[:2]
    assert page.has_more is True
    assert client.files.list(purpose="evals").data == []


def test_a_deleted_file_is_gone_with_its_bytes(client: openai.OpenAI) -> None:
    made = send(client, lines(ROW))
    assert client.files.delete(made.id).deleted is True
    assert stored_files() == []
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)


def test_a_file_whose_content_is_lost_is_said_so(client: openai.OpenAI) -> None:
    made = send(client, lines(ROW))
    store().delete(f"files/{made.id}")
    with pytest.raises(openai.NotFoundError) as refused:
        client.files.content(made.id)
    assert refused.value.param == "file_id"
    assert "upload it again" in refused.value.message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"\xef\xbb\xbf" + lines(ROW), "line 1 is invalid: it begins with a byte order mark"),
        (lines(ROW) + b"\n" + lines(ROW), "line 2 is empty"),
        (lines(ROW) + b'{"prompt": "\xff"}\n', "line 2 is not UTF-8 (byte 13"),
        (lines(ROW) + b"{'a': 1}\n", "line 2 is not valid JSON"),
        (b'{"prompt": NaN, "completion": "b"}', "line 1 is not valid JSON: NaN"),
        (b"[1]\n", "line 1 is not a JSON object"),
        (b'{"prompt": "a", "prompt": "b"}', "a key appears twice"),
        (b"[" * 50_000, "line 1 is nested too deeply"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "a number is too long"),
        (lines({"prompt": "a", "completion": ""}), "completion is empty"),
        (lines({"prompt": "a", "completion": 3}), "completion must be a string"),
        (b'{"prompt": "\\ud800"}', "an unpaired surrogate"),
        (
            lines(ROW, {"prompt": "a"}),
            "line 2 is of format prompt in a file of format prompt_completion",
        ),
        (lines({"question": "a"}), "its keys are 'question'"),
        (lines({"messages": []}), "at least one message"),
        (
            lines({"messages": [{"role": "robot", "content": "a"}]}),
            "messages[0].role must be one of",
        ),
        (lines({"messages": [{"role": "assistant", "content": "a"}]}), "no user message"),
    ],
)
def test_a_bad_row_is_refused_with_its_line_and_leaves_nothing(
    client: openai.OpenAI, content: bytes, reason: str
) -> None:
    error = refusal(client, content)
    assert reason in error.message
    assert (error.code, error.param) == ("invalid_file", "file")


def test_a_line_over_the_limit_is_refused_before_it_is_all_in_memory(
    service: object, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLHOUSE_MAX_LINE_BYTES", "1000")
    get_settings.cache_clear()
    assert (
        "line 2 is longer than 1,000 bytes"
        in refusal(client, lines(ROW, {"prompt": "a" * 2000})).message
    )


def test_a_file_over_the_cap_is_refused_with_413_and_leaves_nothing(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        send(client, lines(*[ROW] * 10_000))
    assert (refused.value.status_code, refused.value.code) == (413, "file_too_large")
    assert stored_files() == []


@pytest.mark.parametrize(
    ("parts", "code", "param"),
    [
        ({"purpose": (None, "fine-tune")}, "missing_required_parameter", "file"),
        ({"file": ("a", lines(ROW))}, "missing_required_parameter", "purpose"),
        ({"purpose": (None, "vision"), "file": ("a", lines(ROW))}, "invalid_value", "purpose"),
        ({"colour": (None, "red"), "file": ("a", lines(ROW))}, "unknown_parameter", "colour"),
    ],
)
def test_a_wrong_form_is_refused_by_name(
    http: httpx.Client, parts: dict[str, tuple[str | None, bytes | str]], code: str, param: str
) -> None:
    answer = http.post("/v1/files", files=parts)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)
    assert stored_files() == []


def test_a_body_that_breaks_off_leaves_nothing(http: httpx.Client) -> None:
    body = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n' + lines(ROW)
    answer = http.post(
        "/v1/files", content=body, headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        400,
        "the multipart body is incomplete",
    )
    assert stored_files() == []


def test_a_full_disk_is_refused_before_anything_is_written(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLHOUSE_MIN_FREE_BYTES", str(2**60))
    get_settings.cache_clear()
    with pytest.raises(openai.InternalServerError) as refused:
        send(client, lines(ROW))
    assert (refused.value.status_code, refused.value.code) == (503, "insufficient_storage")
    assert stored_files() == []


def test_a_store_that_fails_is_said_so_and_left_clean(client: openai.OpenAI) -> None:
    root = Path(get_settings().store_root())
    send(client, lines(ROW))
    incoming = root / ".incoming"
    incoming.rmdir()
    incoming.write_text("in the way")
    with pytest.raises(openai.InternalServerError) as refused:
        send(client, lines(ROW))
    assert refused.value.code == "storage_error"
    assert len(client.files.list().data) == 1


def test_a_file_for_another_purpose_is_kept_as_it_is(client: openai.OpenAI) -> None:
    made = send(client, b"anything \xff", "user_data")
    assert (made.model_extra or {})["format"] is None


def test_a_file_name_is_only_a_label(client: openai.OpenAI) -> None:
    made = client.files.create(file=("..\\..\\etc/passwd", lines(ROW)), purpose="fine-tune")
    assert made.filename == "passwd"
    assert [path.name for path in stored_files()] == [made.id]


def test_an_expiring_file_says_when(client: openai.OpenAI) -> None:
    made = client.files.create(
        file=("a", lines(ROW)),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert made.expires_at is not None
    assert made.expires_at - made.created_at in range(3599, 3603)


def test_another_projects_file_does_not_exist(
    service: object, client: openai.OpenAI, stranger: openai.OpenAI
) -> None:
    made = send(client, lines(ROW))
    for touch in (stranger.files.retrieve, stranger.files.content, stranger.files.delete):
        with pytest.raises(openai.NotFoundError) as refused:
            touch(made.id)
        assert refused.value.code == "resource_not_found"
    assert stranger.files.list().data == []
    assert client.files.retrieve(made.id).id == made.id


def test_a_project_keeps_a_bounded_number_of_files(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, upload: Callable[..., str]
) -> None:
    monkeypatch.setenv("STILLHOUSE_MAX_FILES_PER_PROJECT", "1")
    get_settings.cache_clear()
    upload(client, [ROW])
    with pytest.raises(openai.RateLimitError) as refused:
        upload(client, [ROW])
    assert refused.value.code == "insufficient_quota"
    assert len(stored_files()) == 1
