"""How commands reach a service: lost connections, proxies, and the service of the data folder."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.commands.cli import main
from app.commands.remote_service import Address, RemoteError, RemoteService, find_address, local_url
from app.local.embedded_servers import write_service
from app.settings import Settings
from tests.app.api.conftest import Service, register, service, upload
from tests.losing_proxy import LosingProxy

__all__ = ["register", "service", "upload"]  # fixtures
NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def losing(service: Service) -> Iterator[Callable[[int], tuple[RemoteService, LosingProxy]]]:
    """A function that returns a client whose first responses are lost, and the proxy."""
    with contextlib.ExitStack() as stack:

        def do_connect(num_lost: int) -> tuple[RemoteService, LosingProxy]:
            proxy = LosingProxy(service.url, num_lost)
            stack.callback(proxy.close)
            return stack.enter_context(RemoteService(Address(proxy.url, service.new_key()))), proxy

        yield do_connect


def test_a_lost_response_is_asked_for_again_and_creates_no_second_job(
    service: Service,
    losing: Callable[[int], tuple[RemoteService, LosingProxy]],
    register: Callable[..., str],
    upload: Callable[..., str],
) -> None:
    register("tiny")
    with service.client() as client:
        file_id = upload(client, [{"prompt": "What is money?"}] * 12)
    remote, proxy = losing(2)
    method = {"type": "distillation", "distillation": {"teacher": "tiny"}}
    body = {"model": "tiny", "training_file": file_id, "method": method}
    job = remote.create("/v1/fine_tuning/jobs", body)
    assert len([line for line in proxy.requests if b"POST /v1/fine_tuning/jobs" in line]) == 3
    proxy.num_lost = 1
    assert [found["id"] for found in remote.get("/v1/fine_tuning/jobs")["data"]] == [job["id"]]
    proxy.num_lost = 1
    with pytest.raises(RemoteError, match="does not answer"):
        remote.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")  # is not repeated
    assert remote.get(f"/v1/fine_tuning/jobs/{job['id']}")["status"] == "cancelled"


def test_a_route_that_an_older_service_lacks_is_named(service: Service) -> None:
    with (
        RemoteService(Address(f"{service.url}/v1/", service.new_key())) as remote,
        pytest.raises(RemoteError, match="does not have GET /v1/later: it is older than this"),
    ):
        remote.get("/v1/later")


def test_no_proxy_is_used_for_this_machine(
    service: Service,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, NOBODY)
    with pytest.raises(SystemExit) as ended:
        main(["models", "list", "--json", "--url", service.url, "--key", service.new_key()])
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out) == {"object": "list", "data": []}


def test_the_service_of_the_data_folder_is_found_at_its_own_port(
    settings_env: Callable[..., Settings],
) -> None:
    settings = settings_env()
    settings.data_dir.mkdir(parents=True)
    (settings.data_dir / "api_key").write_text("sk-sh-operator\n")
    write_service(settings.data_dir, {"STILLHOUSE_HOST": "0.0.0.0", "STILLHOUSE_PORT": "8411"})
    assert find_address(settings, None, None) == Address("http://127.0.0.1:8411", "sk-sh-operator")
    assert local_url("::1", 8400) == "http://[::1]:8400"


@pytest.mark.parametrize("command", [["files", "list"], ["models", "list"]], ids=" ".join)
def test_an_explicit_data_folder_wins_over_the_service_of_the_environment(
    service: Service,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: list[str],
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    key, port = service.new_key(), service.url.rpartition(":")[2]
    write_service(folder, {"STILLHOUSE_HOST": "127.0.0.1", "STILLHOUSE_PORT": port})

    def run(*options: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*command, "--json", *options])
        return f"{capsys.readouterr().out}{ended.value.code}"

    monkeypatch.setenv("STILLHOUSE_API_KEY", key)
    assert run("--data-dir", str(folder)).endswith("0")  # the key is not for another service
    monkeypatch.setenv("STILLHOUSE_URL", NOBODY)
    assert "does not answer" in run()
    assert "does not answer" in run("--data-dir", str(folder), "--url", NOBODY)
    assert "no service runs" in run("--data-dir", str(folder))
    assert run("--data-dir", str(folder), "--key", key).endswith("0")
    (folder / "api_key").write_text(key)
    monkeypatch.setenv("STILLHOUSE_API_KEY", "sk-sh-away")
    assert run("--data-dir", str(folder)).endswith("0")


@pytest.mark.parametrize(
    "url",
    ["stillhouse.example", "ftp://x", "http://", "http://x:port", "http://[::1", "http://a\x00b"],
)
def test_what_is_no_url_is_refused(settings_env: Callable[..., Settings], url: str) -> None:
    with pytest.raises(RemoteError, match="is not a URL"):
        find_address(settings_env(), url, "k")


def test_without_a_service_and_a_key_the_error_says_what_to_do(
    settings_env: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = settings_env()
    with pytest.raises(RemoteError, match="run `stillhouse up`, give --data-dir"):
        find_address(settings, None, None)
    with pytest.raises(RemoteError, match="has characters that no key has"):
        find_address(settings, "http://127.0.0.1:8400", "ключ")


def test_an_id_that_makes_no_url_is_an_error_with_advice() -> None:
    with (
        RemoteService(Address(NOBODY, "k")) as remote,
        pytest.raises(RemoteError, match="is the id correct"),
    ):
        remote.get("/v1/models/" + "m" * 70_000)


def test_an_unreadable_key_is_an_error_with_its_path(
    settings_env: Callable[..., Settings],
) -> None:
    settings = settings_env()
    (settings.data_dir / "api_key").mkdir(parents=True)
    with pytest.raises(RemoteError, match=r"api_key cannot be read .*; give --key"):
        find_address(settings, None, None)
