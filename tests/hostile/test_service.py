"""A whole service under a stranger's hands: it stays alive and small, logs no secret, and the doctor tells how it is."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from app.local.embedded_servers import LocalValkey
from tests.e2e.service import TEACHER, start_service
from tests.hostile.artefacts import REFUSED
from tests.hostile.fuzz import QUIET, make_objects, run_schemathesis

pytestmark = pytest.mark.e2e
LOOP = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
SWELL = "{% set ns = namespace(x='a' * 999) %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
SLEEPER = f"{{% if messages[0].content == 'loop' %}}{LOOP}{{% elif messages[0].content == 'swell' %}}{SWELL}{{% endif %}}"
SLEEPER += "{% for m in messages %}{{ m.content }}{% endfor %}"
MIB = 2**20
Json = Any  # Any: JSON


class Place:
    """A running service, and its broker, which a test may stop."""

    def __init__(self, folder: Path) -> None:
        self.valkey = LocalValkey(folder / "valkey")
        self.valkey.start()
        limits = {
            "STILLHOUSE_MAX_FILE_BYTES": str(128 * MIB),
            "STILLHOUSE_STORE_URL": str(folder / "store"),
        }
        self.service = start_service(
            folder / "data", STILLHOUSE_REDIS_URL=self.valkey.url, **QUIET, **limits
        )

    def http(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.service.key}"}
        return httpx.Client(base_url=self.service.url, headers=headers, timeout=60)

    def only(self, *words: str) -> psutil.Process:
        (found,) = self.service.processes(*words)
        return found

    def close(self) -> None:
        self.service.stop()
        self.valkey.stop()


@pytest.fixture(scope="module")
def place(service_dir: Path, tiny_llama_dir: Path) -> Iterator[Place]:
    made = Place(service_dir / "hostile")
    try:
        made.service.cli("models", "import", str(tiny_llama_dir), "--name", TEACHER)
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def ids(place: Place) -> dict[str, list[str]]:
    return make_objects(place.service.client())


PURPOSE = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
FILE = b'--b\r\nContent-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n'
ENDLESS = {
    "a line": (PURPOSE + FILE + b'{"text": "', b"a"),
    "blank lines": (PURPOSE + FILE, b"\n"),
    "a field": (b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n', b"a"),
    "a part's header": (b"--b\r\nContent-Disposition: ", b"a"),
    "a part's headers": (b"--b\r\n", b"X: y\r\n"),
    "parts": (b"", FILE[:-2] + b"\r\n\r\n\r\n"),
    "a preamble": (b"", b"a"),
}


def pieces_of(name: str, num_bytes: int) -> Iterator[bytes]:
    """A multipart body in which something never ends."""
    begin, more = ENDLESS[name]
    yield begin
    for _ in range(num_bytes // MIB):
        yield more * (MIB // len(more))
    yield b'"}\r\n--b--\r\n'


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.parametrize(("num_bytes", "statuses"), [(40 * MIB, {400}), (160 * MIB, {400, 413})])
def test_an_upload_without_end_leaves_the_api_small(
    place: Place, name: str, num_bytes: int, statuses: set[int]
) -> None:
    api = place.only("app.commands.cli", "api")
    before, most = api.memory_info().rss, 0
    with place.http() as http:

        def watched() -> Iterator[bytes]:
            nonlocal most
            for piece in pieces_of(name, num_bytes):
                most = max(most, api.memory_info().rss)
                yield piece

        answer = http.post(
            "/v1/files",
            content=watched(),
            headers={"content-type": "multipart/form-data; boundary=b"},
        )
    assert answer.status_code in statuses, answer.text
    assert most - before < 24 * MIB


HEADERS = {
    "a value": (b"GET /health/live HTTP/1.1\r\nHost: a\r\nX: ", b"a"),
    "a name": (b"GET /health/live HTTP/1.1\r\nHost: a\r\n", b"a"),
    "a path": (b"GET /", b"a"),
    "headers": (b"GET /health/live HTTP/1.1\r\n", b"X: y\r\n"),
    "a chunk's extension": (
        b"POST /v1/files HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;",
        b"a",
    ),
    "trailers": (
        b"POST /v1/batches HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
        b"X: y\r\n",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_stranger_cannot_fill_the_memory_with_headers(place: Place, name: str) -> None:
    """Without a key: this is before anybody is asked for one."""
    api = place.only("app.commands.cli", "api")
    before = api.memory_info().rss
    begin, more = HEADERS[name]
    is_cut = False
    with socket.create_connection(("127.0.0.1", place.service.port), timeout=10) as connection:
        try:
            for piece in [begin, *[more * (MIB // len(more))] * 64]:
                connection.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            is_cut = True
        assert api.memory_info().rss - before < 16 * MIB
    assert is_cut
    with place.http() as http:
        assert http.get("/health/live").status_code == 200


BODIES: dict[str, bytes] = {
    "nested deeply": b'{"model":' * 50_000 + b"1" + b"}" * 50_000,
    "arrays nested deeply": b"[" * 200_000,
    "a number of a million digits": b'{"model": "a", "max_tokens": ' + b"9" * 10**6 + b"}",
    "1e999": b'{"model": "a", "temperature": 1e999}',
    "NaN": b'{"model": "a", "temperature": NaN}',
    "no UTF-8": b'{"model": "\xff\xfe"}',
    "half a surrogate": b'{"model": "\\ud800"}',
    "a NUL in JSON": b'{"model": "\\u0000"}',
    "a raw NUL": b'{"model": "\x00"}',
    "a key twice": b'{"model": "a", "model": "b"}',
    "a list": b"[]",
    "a text": b'"a"',
    "UTF-16": '{"model": "a"}'.encode("utf-16"),
    "a gzip": b"\x1f\x8b\x08\x00" + b"\x00" * 100,
    "10,000 keys": json.dumps({f"k{i}": i for i in range(10_000)}).encode(),
    "a file URL": b'{"model": "file:///etc/passwd", "prompt": "a"}',
    "a prototype": b'{"__proto__": {"x": 1}, "constructor": 1}',
}


@pytest.mark.parametrize("name", BODIES)
def test_a_hostile_body_is_a_fault_of_the_client_on_every_route(place: Place, name: str) -> None:
    with place.http() as http:
        paths = http.get("/openapi.json").json()["paths"]
        for path, operations in paths.items():
            for method in operations:
                if "application/json" not in operations[method].get("requestBody", {}).get(
                    "content", {}
                ):
                    continue
                where = re.sub(r"{\w+}", "absent", path)
                for kind in (
                    {"content-type": "application/json"},
                    {"content-type": "text/plain"},
                    {},
                ):
                    answer = http.request(method, where, content=BODIES[name], headers=kind)
                    assert 400 <= answer.status_code < 500, (path, answer.text[:300])
                    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


PATHS = (
    "..%2f..%2fetc%2fpasswd",
    "..%252f..%252fetc",
    "%2e%2e/%2e%2e/pepper",
    "a%00b",
    "..\\..\\pepper",
    "%ff%fe",
    "a" * 4000,
)


@pytest.mark.parametrize("path", PATHS)
def test_a_traversal_finds_nothing(place: Place, path: str) -> None:
    with place.http() as http:
        for route in (
            "/v1/files/{}",
            "/v1/files/{}/content",
            "/v1/models/{}",
            "/v1/batches/{}",
            f"/v1/models/{TEACHER}/files/{{}}",
        ):
            answer = http.get(route.format(path))
            assert answer.status_code in (400, 404), answer.text
            assert "root:" not in answer.text


@pytest.mark.parametrize(
    "name",
    ["../../../etc/cron.d/x", "..\\..\\x", "a\x00b", "/abs", ".", "\u202egpj.exe", "a" * 5000],
)
def test_a_file_name_is_a_label(place: Place, name: str) -> None:
    with place.http() as http:
        answer = http.post(
            "/v1/files", files={"file": (name, b'{"text": "a"}')}, data={"purpose": "fine-tune"}
        )
    if answer.status_code == 200:
        assert "/" not in answer.json()["filename"]
        assert "\\" not in answer.json()["filename"]
        assert len(answer.json()["filename"]) <= 255
    else:
        assert answer.status_code == 400, answer.text


def test_a_zip_bomb_is_kept_as_it_came(place: Place, tmp_path: Path) -> None:
    """No path of ours unpacks anything."""
    REFUSED["zip bomb for config"](tmp_path)
    content = (tmp_path / "config.json").read_bytes()
    with place.http() as http:
        kept = http.post(
            "/v1/files", files={"file": ("bomb.zip", content)}, data={"purpose": "user_data"}
        )
        assert kept.json()["bytes"] == len(content) < 100_000
        refused = http.post(
            "/v1/files", files={"file": ("bomb.zip", content)}, data={"purpose": "fine-tune"}
        )
    assert refused.status_code == 400


def test_an_import_through_the_service_fails_with_a_reason(
    place: Place, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    REFUSED["auto_map"](folder)
    with pytest.raises(AssertionError, match="auto_map"):
        place.service.cli("models", "import", str(folder), "--name", "evil")


def chat(client: openai.OpenAI, model: str, text: str) -> str:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], max_tokens=2, temperature=0
    )
    return str(answer.choices[0].finish_reason)


def test_a_template_that_turns_bad_later_ends_its_own_requests_only(
    place: Place, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """It renders what the import tries, and loops or swells on a word of its own."""
    folder = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(SLEEPER)
    place.service.cli("models", "import", str(folder), "--name", "sleeper")
    client = place.service.client(max_retries=0)
    assert chat(client, "sleeper", "Hello")
    worker = place.only("worker.main", "serve")
    before = worker.memory_info().rss
    for word in ("loop", "swell", "swell"):
        with pytest.raises(openai.BadRequestError, match="template"):
            chat(client, "sleeper", word)
    assert chat(client, "sleeper", "Hello")
    assert chat(client, TEACHER, "Hello")
    assert worker.is_running()
    assert worker.memory_info().rss - before < 64 * MIB


def test_a_tokenizer_that_gives_up_ends_its_own_requests_only(
    place: Place, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """The library panics there, which is no Exception."""
    folder = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    state = json.loads((folder / "tokenizer.json").read_text())
    split = {
        "type": "Split",
        "pattern": {"Regex": "(x+x+)+y"},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    place.service.cli("models", "import", str(folder), "--name", "panics")
    client = place.service.client(max_retries=0)
    worker = place.only("worker.main", "serve")
    with pytest.raises(openai.BadRequestError, match="tokenizer"):
        client.completions.create(model="panics", prompt="x" * 60, max_tokens=2)
    assert client.completions.create(model="panics", prompt="Hello", max_tokens=2).choices
    assert client.completions.create(model=TEACHER, prompt="Hello", max_tokens=2).choices
    assert worker.is_running()
    row = json.dumps({"text": "x" * 600}).encode()
    file = client.files.create(file=("rows.jsonl", row), purpose="fine-tune")
    method: Json = {
        "type": "distillation",
        "distillation": {"teacher": "panics", "student": {"num_layers": 2}},
    }
    with pytest.raises(openai.BadRequestError, match="tokenizer"):
        client.fine_tuning.jobs.create(model="panics", training_file=file.id, method=method)


def test_a_decoder_that_gives_up_ends_its_own_requests_only(
    place: Place, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """The same on the way back to text, in the thread of all engines."""
    folder = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    state = json.loads((folder / "tokenizer.json").read_text())
    # what looks ahead is beyond Rust's own patterns, and goes to a library that counts its steps
    replace = {"type": "Replace", "pattern": {"Regex": "(x+x+)+(?=y)"}, "content": ""}
    state["decoder"] = {
        "type": "Sequence",
        "decoders": [state["decoder"], {"type": "Fuse"}, replace],
    }
    vocab, last = state["model"]["vocab"], "".join(state["model"]["merges"].pop())
    vocab["x" * 40] = swollen = vocab.pop(last)  # a token that a request can force
    (folder / "tokenizer.json").write_text(json.dumps(state))
    place.service.cli("models", "import", str(folder), "--name", "garbler")
    client = place.service.client(max_retries=0)
    worker = place.only("worker.main", "serve")
    for _ in range(2):
        with pytest.raises(openai.InternalServerError, match="tokenizer"):
            client.completions.create(
                model="garbler", prompt=[vocab["x"]] * 60, max_tokens=2, echo=True
            )
    beside: Json = {"model": "garbler", "prompt": "Hello", "max_tokens": 150, "temperature": 0}
    forced = {str(swollen): 100}
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(
            lambda: client.completions.create(**beside, extra_body={"ignore_eos": True})
        )
        with pytest.raises(openai.InternalServerError, match="tokenizer"):
            client.completions.create(
                model="garbler", prompt="Hi", max_tokens=20, logit_bias=forced
            )
        assert other.result().choices[0].finish_reason == "length"
    for name in ("garbler", TEACHER):  # greedy: a sampled token could be the swollen one
        assert client.completions.create(**{**beside, "model": name, "max_tokens": 2}).choices
    assert worker.is_running()


def test_no_log_holds_a_key_a_prompt_or_a_row(place: Place) -> None:
    """A session with errors in every corner, then every log of every process."""
    key, prompt, row, wrong = (
        place.service.key,
        "canary-prompt-7391",
        "canary-row-5512",
        "canary-wrong-8816",
    )
    client = place.service.client(max_retries=0)
    rows = "".join(
        json.dumps({"prompt": f"{row} {i}", "completion": row}) + "\n" for i in range(6)
    ).encode()
    file = client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
    bad = rows + f'{{"prompt": "{row}", "{row}": 1}}'.encode()
    with place.http() as http:
        http.post("/v1/files", files={"file": ("rows.jsonl", bad)}, data={"purpose": "fine-tune"})
        http.post("/v1/completions", content=f'{{"model": "{prompt}", "prompt": "{prompt}'.encode())
        http.post("/v1/completions", json={"model": TEACHER, "prompt": prompt, prompt: prompt})
        http.post(
            "/v1/completions", json={"model": TEACHER, "prompt": prompt * 400, "max_tokens": 5}
        )
        http.post(
            "/v1/chat/completions",
            json={"model": TEACHER, "messages": [{"role": prompt, "content": prompt}]},
        )
        http.get(
            f"/v1/models?{prompt}={prompt}", headers={"authorization": f"Bearer sk-sh-{wrong}"}
        )
        http.get("/v1/files", headers={"authorization": f"Bearer {key[:-3]}zzz"})
        with http.stream(
            "POST",
            "/v1/completions",
            json={"model": TEACHER, "prompt": prompt, "max_tokens": 60, "stream": True},
        ) as stream:
            next(stream.iter_bytes())  # and hang up
    client.completions.create(model=TEACHER, prompt=prompt, max_tokens=3)
    chat(client, TEACHER, prompt)
    method: Json = {
        "type": "distillation",
        "distillation": {"teacher": TEACHER, "student": {"num_layers": 2}},
    }
    job = client.fine_tuning.jobs.create(model=TEACHER, training_file=file.id, method=method).id
    line: Json = {"custom_id": "a", "method": "POST", "url": "/v1/completions"}
    line |= {"body": {"model": TEACHER, "prompt": prompt * 400, "max_tokens": 60}}
    asked = client.files.create(file=("asked.jsonl", json.dumps(line).encode()), purpose="batch")
    client.batches.create(
        input_file_id=asked.id, endpoint="/v1/completions", completion_window="24h"
    )
    deadline = time.monotonic() + 240
    while client.fine_tuning.jobs.retrieve(job).status in ("queued", "running"):
        assert time.monotonic() < deadline
        time.sleep(0.3)
    root = place.service.data_dir.parent
    logs = [
        path
        for path in root.rglob("*")
        if path.is_file() and ("log" in path.name or "logs" in path.parts)
    ]
    logs = [path for path in logs if "/store/" not in str(path) and "/base/" not in str(path)]
    assert {"api.log", "up.log", "train-worker-1.log", "serve-worker-1.log"} <= {
        path.name for path in logs
    }
    secrets = (key, key.split("-", 3)[3], key[:-3], prompt, row, wrong)
    for path in logs:
        with contextlib.suppress(FileNotFoundError):  # a log of Postgres that was replaced
            text = path.read_bytes()
            assert [secret for secret in secrets if secret.encode() in text] == [], path.name


def doctor(place: Place) -> tuple[int, list[Json]]:
    settings = {
        "STILLHOUSE_DATA_DIR": str(place.service.data_dir),
        "STILLHOUSE_PORT": str(place.service.port),
    }
    done = subprocess.run(
        [sys.executable, "-m", "app.commands.cli", "doctor", "--json"],
        env={**place.service.environment, **settings},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    findings: list[Json] = json.loads(done.stdout)["findings"]
    return done.returncode, findings


def test_the_doctor_finds_a_sound_service_sound(place: Place) -> None:
    status, findings = doctor(place)
    assert [finding for finding in findings if finding["status"] != "ok"] == []
    assert status == 0
    names = {
        "database",
        "durability",
        "clock",
        "schema",
        "broker",
        "eviction",
        "persistence",
        "store",
    }
    names |= {"disk", "serving", "training", "api", "gpu", "kernels", "key files"}
    assert {finding["name"] for finding in findings} == names


def test_the_doctor_says_what_to_do_about_an_open_key_file(place: Place) -> None:
    path = place.service.data_dir / "api_key"
    path.chmod(0o644)
    status, findings = doctor(place)
    path.chmod(0o600)
    assert status == 1
    assert [finding["advice"] for finding in findings if finding["advice"]] == [
        f"run `chmod 600 {path}`"
    ]


def test_a_short_fuzz_finds_no_fault_of_the_server_and_no_broken_promise(
    place: Place, ids: dict[str, list[str]]
) -> None:
    """The long form is `make fuzz`."""
    key = place.service.key
    report, output = run_schemathesis(
        place.service.url, key, ids, 1, "--max-examples", "2", "--generation-deterministic"
    )
    assert report["failures"] + report["errors"] == [], output[-6000:]
    assert report["test_cases"]["generated"] > 1000
    assert report["operations"]["tested"] == report["operations"]["total"]


def test_the_doctor_says_that_the_broker_is_gone(place: Place) -> None:
    """The last test here: it stops the broker."""
    place.valkey.stop()
    status, findings = doctor(place)
    assert status == 1
    failed = {finding["name"]: finding for finding in findings if finding["status"] == "fail"}
    assert set(failed) == {"broker", "workers"}
    assert "STILLHOUSE_REDIS_URL" in failed["broker"]["advice"]
    with place.http() as http:
        assert http.get("/v1/files").status_code == 200
