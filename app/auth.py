"""Creation and verification of API keys of the form `sk-sh-{key_id}-{secret}`.

A key is found by its id. The HMAC of its secret is compared in constant time.
"""

import contextlib
import hmac
import os
import re
import secrets
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from app.db import keys
from app.db.session import Session
from app.db.usage.limits import UNLIMITED, Limits
from app.errors import BadRequest, Forbidden, Unauthenticated
from app.settings import Settings, get_settings

HUB_TOKEN_SCOPE = "hub:token"  # lets imports use the service's own hub token
SCOPES = (
    "jobs:read",
    "jobs:write",
    "files:read",
    "files:write",
    "models:read",
    "models:write",
    "inference",
    HUB_TOKEN_SCOPE,
    "admin",
)
TENANT_SCOPES = tuple(scope for scope in SCOPES if scope not in {"admin", HUB_TOKEN_SCOPE})
KEY_PATTERN = re.compile(r"sk-sh-([0-9a-f]{16})-([A-Za-z0-9_-]{20,80})")
PROJECT_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
# Compared when the key id is unknown, so that both refusals take the same time.
UNKNOWN_HMAC = bytes(32)


@dataclass(frozen=True)
class Principal:
    """Authenticated caller of a request.

    `project_id` owns everything that the request creates. `scopes` are those of the API key.
    `limits` are those of the key, and `project_limits` those that all keys of the project share.
    """

    project_id: str
    key_id: str
    scopes: frozenset[str]
    limits: Limits = UNLIMITED
    project_limits: Limits = UNLIMITED

    def has(self, scope: str) -> bool:
        """Returns whether the key has the scope; `admin` includes all others."""
        return scope in self.scopes or "admin" in self.scopes

    def demand(self, scope: str) -> None:
        """Raises Forbidden unless the key has the scope."""
        if not self.has(scope):
            raise Forbidden(f"this key lacks the scope {scope!r}; ask for a key that has it")


def create_key(
    session: Session,
    project_id: str,
    *,
    scopes: Iterable[str] = TENANT_SCOPES,
    expires_at: datetime | None = None,
    limits: Limits = UNLIMITED,
) -> str:
    """Creates a key and returns it in plain text. Only an HMAC of its secret is stored.

    Raises:
        BadRequest: A scope is unknown, no scope is given, or the project name is invalid.
    """
    wanted = sorted(set(scopes))
    unknown = [scope for scope in wanted if scope not in SCOPES]
    if unknown or not wanted:
        raise BadRequest(
            f"unknown scopes {unknown}; choose from {', '.join(SCOPES)}", param="scopes"
        )
    check_project_name(project_id)
    key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    keys.insert_key(
        session,
        id=key_id,
        project_id=project_id,
        secret_hmac=secret_hmac(secret),
        scopes=wanted,
        expires_at=expires_at,
        limits=limits,
    )
    return f"sk-sh-{key_id}-{secret}"


def check_project_name(project_id: str) -> None:
    """Raises BadRequest if no project can have this name."""
    if not PROJECT_PATTERN.fullmatch(project_id):
        raise BadRequest(
            "a project name has 1 to 64 of the characters a-z 0-9 . _ - and begins with a letter or digit",
            param="project",
        )


def authenticate(authorization: str | None) -> Principal:
    """Returns the principal of an `Authorization: Bearer …` header.

    Raises:
        Unauthenticated: The key is missing, malformed, unknown, revoked or expired.
    """
    if not authorization:
        raise Unauthenticated("no API key: send the header `Authorization: Bearer sk-sh-…`")
    scheme, _, credential = authorization.partition(" ")
    match = KEY_PATTERN.fullmatch(credential.strip())
    if scheme.lower() != "bearer" or match is None:
        raise Unauthenticated("the API key is malformed: it must have the form sk-sh-{id}-{secret}")
    key_id, secret = match.groups()
    key = keys.read_key(key_id)
    is_equal = hmac.compare_digest(secret_hmac(secret), key.secret_hmac if key else UNKNOWN_HMAC)
    if key is None or not is_equal or key.revoked_at is not None:
        raise Unauthenticated("the API key is wrong or revoked")
    if key.expires_at is not None and key.expires_at <= datetime.now(UTC):
        raise Unauthenticated("the API key has expired")
    return Principal(key.project_id, key_id, frozenset(key.scopes), key.limits, key.project_limits)


def claimed_key_id(authorization: str | None) -> str:
    """Returns the key id in the header without verifying the key, or "" if there is none."""
    match = KEY_PATTERN.fullmatch((authorization or "").partition(" ")[2].strip())
    return match[1] if match else ""


def secret_hmac(secret: str) -> bytes:
    """Returns the HMAC-SHA-256 of a key's secret, with the pepper as the HMAC key."""
    return hmac.digest(key_pepper(get_settings()), secret.encode(), sha256)


def key_pepper(settings: Settings) -> bytes:
    """Returns the pepper: the service's secret that is mixed into the hash of every API key.

    Raises RuntimeError if no pepper is configured, or if its file is empty.
    """
    if settings.key_pepper:
        return settings.key_pepper.encode()
    path = settings.data_dir / "pepper"
    try:
        pepper = read_pepper(path)
    except FileNotFoundError:
        raise RuntimeError(
            "no pepper for API keys: set STILLHOUSE_KEY_PEPPER, or run `stillhouse up`"
        ) from None
    if not pepper:
        raise RuntimeError(
            f"the pepper file {path} is empty: restore it from a backup, or delete it, run `stillhouse up` and "
            "create new API keys, because the old ones are no longer valid"
        )
    return pepper


@lru_cache
def read_pepper(path: Path) -> bytes:
    """Returns the pepper in the file. The result is cached for the life of the process."""
    return path.read_bytes().strip()


def ensure_pepper(settings: Settings) -> None:
    """Creates the pepper file (mode 600) unless a pepper is configured or the file exists."""
    path = settings.data_dir / "pepper"
    if settings.key_pepper or path.exists():
        return
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    # A temporary file is written first and then linked. A crash leaves no empty pepper, and a
    # second process cannot replace a pepper that exists.
    handle, name = tempfile.mkstemp(prefix="pepper.", dir=settings.data_dir)
    try:
        with open(handle, "w") as file:
            file.write(secrets.token_urlsafe(32))
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        os.unlink(name)
