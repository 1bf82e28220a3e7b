import secrets
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from app import auth
from app.db import keys
from app.db.schema.tables import ApiKey
from app.db.session import transaction
from app.errors import BadRequest, Forbidden, Unauthenticated
from app.settings import Settings, get_settings


@pytest.fixture(autouse=True)
def pepper(database: str, settings_env: Callable[..., Settings]) -> None:
    settings_env(key_pepper="pepper")


def new_key(**options: object) -> str:
    with transaction() as session:
        return auth.create_key(session, "acme", **options)  # type: ignore[arg-type] # the tests pass right ones


def authenticate(header: str | None) -> auth.Principal:
    return auth.authenticate(header)


def test_a_new_key_opens_its_project_with_its_scopes() -> None:
    principal = authenticate(f"Bearer {new_key(scopes=['jobs:read', 'inference'])}")
    assert principal.project_id == "acme"
    assert principal.scopes == {"jobs:read", "inference"}
    principal.demand("inference")
    with pytest.raises(Forbidden):
        principal.demand("jobs:write")


def test_admin_has_every_scope() -> None:
    principal = authenticate(f"Bearer {new_key(scopes=['admin'])}")
    for scope in auth.SCOPES:
        principal.demand(scope)


def test_a_new_key_has_neither_admin_nor_the_hub_token_unless_asked() -> None:
    principal = authenticate(f"Bearer {new_key()}")
    assert principal.has("jobs:write")
    assert not principal.has("admin")
    assert not principal.has("hub:token")
    assert authenticate(f"Bearer {new_key(scopes=['hub:token'])}").has("hub:token")


def test_the_secret_is_not_kept() -> None:
    key = new_key()
    secret = key.split("-", 3)[3]
    with transaction() as session:
        (row,) = session.query(ApiKey).all()
    assert secret.encode() not in row.secret_hmac
    assert len(row.secret_hmac) == 32


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer sk-other", "Basic abc", "Bearer sk-sh-1-2"]
)
def test_no_key_or_a_malformed_one_is_refused(header: str | None) -> None:
    with pytest.raises(Unauthenticated):
        authenticate(header)


def test_a_wrong_secret_and_an_unknown_id_get_the_same_answer() -> None:
    key = new_key()
    key_id = key.split("-")[2]
    answers = []
    for wrong in (
        f"sk-sh-{key_id}-{secrets.token_urlsafe(32)}",
        f"sk-sh-{'0' * 16}-{secrets.token_urlsafe(32)}",
    ):
        with pytest.raises(Unauthenticated) as refused:
            authenticate(f"Bearer {wrong}")
        answers.append((refused.value.message, refused.value.code))
    assert answers[0] == answers[1]


def test_a_revoked_key_is_refused() -> None:
    key = new_key()
    with transaction() as session:
        keys.revoke_key(session, key.split("-")[2])
    with pytest.raises(Unauthenticated):
        authenticate(f"Bearer {key}")


def test_an_expired_key_is_refused() -> None:
    with pytest.raises(Unauthenticated):
        authenticate(f"Bearer {new_key(expires_at=datetime.now(UTC) - timedelta(seconds=1))}")


def test_another_pepper_opens_nothing(settings_env: Callable[..., Settings]) -> None:
    key = new_key()
    settings_env(key_pepper="other")
    with pytest.raises(Unauthenticated):
        authenticate(f"Bearer {key}")


def test_unknown_scopes_and_strange_projects_are_refused() -> None:
    with pytest.raises(BadRequest):
        new_key(scopes=["everything"])
    with transaction() as session, pytest.raises(BadRequest):
        auth.create_key(session, "../acme")


def test_a_pepper_is_made_once_and_for_the_owner_only(
    settings_env: Callable[..., Settings],
) -> None:
    settings_env(key_pepper="")
    with pytest.raises(RuntimeError):
        auth.key_pepper(get_settings())
    auth.ensure_pepper(get_settings())
    first = auth.key_pepper(get_settings())
    auth.ensure_pepper(get_settings())
    assert auth.key_pepper(get_settings()) == first
    assert stat.S_IMODE((get_settings().data_dir / "pepper").stat().st_mode) == 0o600


@pytest.mark.parametrize("content", ["", " \n"])
def test_an_empty_pepper_file_is_refused(
    settings_env: Callable[..., Settings], content: str
) -> None:
    settings = settings_env(key_pepper="")
    settings.data_dir.mkdir(parents=True)
    (settings.data_dir / "pepper").write_text(content)
    auth.ensure_pepper(settings)
    with pytest.raises(RuntimeError, match="is empty"):
        auth.key_pepper(settings)
