"""`stillhouse models push` with the real huggingface_hub against a hub on the loopback."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.commands.model_pushes import Hub, push
from app.commands.remote_service import Address, RemoteError, RemoteService
from app.settings import Settings
from tests.app.api.conftest import Service, register, service
from tests.hub_server import HubServer, running_hub
from worker.models.hub import fetch_from_hub

# huggingface_hub uploads LFS objects with an argument that httpx2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
__all__ = ["register", "service"]  # fixtures
Register = Callable[..., str]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with running_hub() as server:
        yield server


@pytest.fixture
def remote(service: Service) -> Iterator[RemoteService]:
    with RemoteService(Address(service.url, service.new_key())) as connected:
        yield connected


@pytest.fixture
def send(remote: RemoteService, hub: HubServer, tmp_path: Path) -> Callable[..., str]:
    def do_push(model: str = "tiny", repository: str = "org/student", **changes: Any) -> str:
        values: dict[str, Any] = {
            "hub": Hub(hub.url, hub.token),
            "revision": None,
            "is_private": True,
            "data_dir": tmp_path,
            "tell": lambda line: None,
        }
        return push(remote, model, repository, **(values | changes))

    return do_push


def test_a_pushed_model_can_be_imported_from_the_hub(
    send: Callable[..., str],
    hub: HubServer,
    register: Register,
    tiny_llama_dir: Path,
    tmp_path: Path,
) -> None:
    register("tiny")
    url = send()
    assert url == f"{hub.url}/org/student/commit/{hub.commit_of('org/student')}"
    files = hub.repositories["org/student"]
    assert files.pop("README.md").startswith(b"---\nlibrary_name: transformers\n")
    assert files == {path.name: path.read_bytes() for path in tiny_llama_dir.iterdir()}
    assert hub.is_private == {"org/student": True}
    assert list((tmp_path / "pushes").iterdir()) == []
    fetch_from_hub(
        "org/student",
        tmp_path / "back",
        endpoint=hub.url,
        token=None,
        on_progress=lambda done, total: None,
    )
    weights = (tmp_path / "back" / "model.safetensors").read_bytes()
    assert weights == (tiny_llama_dir / "model.safetensors").read_bytes()


def test_a_second_push_of_an_alias_replaces_what_has_changed(
    send: Callable[..., str],
    remote: RemoteService,
    hub: HubServer,
    register: Register,
    tmp_path: Path,
) -> None:
    register("tiny")
    send()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"changed": true}')
    register("other", folder=tmp_path / "other")
    remote.http.put("/v1/models/support/aliases/prod", json={"model": "other"})
    send("support@prod", is_private=False)
    assert hub.repositories["org/student"]["config.json"] == b'{"changed": true}'
    assert hub.is_private == {"org/student": True}


def test_an_upload_that_fails_keeps_the_copy_and_can_be_repeated(
    send: Callable[..., str], hub: HubServer, register: Register, tmp_path: Path
) -> None:
    register("tiny")
    hub.num_failures = 1
    with pytest.raises(RemoteError, match="run the command again"):
        send()
    assert hub.repositories["org/student"] == {}
    assert len(list((tmp_path / "pushes").iterdir())) == 1
    send()
    assert "model.safetensors" in hub.repositories["org/student"]


def test_a_wrong_token_is_a_clear_error(
    send: Callable[..., str], hub: HubServer, register: Register
) -> None:
    register("tiny")
    with pytest.raises(RemoteError, match="STILLHOUSE_HF_TOKEN"):
        send(hub=Hub(hub.url, "hf_wrong"))
    assert hub.repositories == {}


@pytest.mark.parametrize("repository", ["student", "a/b/c", "../x", "org/..", "org/a b", ""])
def test_a_name_that_is_no_repository_is_refused(send: Callable[..., str], repository: str) -> None:
    with pytest.raises(RemoteError, match="org/name"):
        send(repository=repository)


def test_the_token_of_the_public_hub_is_not_sent_to_another_one(
    settings_env: Callable[..., Settings],
) -> None:
    settings = settings_env()
    assert Hub.of(settings, None) == Hub(None, None)
    assert Hub.of(settings, "http://hub.example") == Hub("http://hub.example", False)
    settings = settings_env(hf_token="hf_ours", hf_endpoint="http://ours.example")
    assert Hub.of(settings, None) == Hub("http://ours.example", "hf_ours")
