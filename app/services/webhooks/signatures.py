"""Secrets and signatures of the Standard Webhooks specification, version 1 (HMAC-SHA256)."""

import base64
import hmac
import secrets
from collections.abc import Sequence
from hashlib import sha256
from typing import Final

PREFIX: Final = "whsec_"
SECRET_BYTES: Final = 32


def new_secret() -> str:
    """Returns a random secret: `whsec_` and 32 bytes in base64."""
    return PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def signed_headers(
    body: bytes, *, message_id: str, timestamp: int, signing_secrets: Sequence[str]
) -> dict[str, str]:
    """Returns the headers that identify and sign a request with this body.

    `message_id` is the same in all attempts, and `timestamp` is the time of this one. There is one
    signature per secret. A receiver accepts the request if any of them matches.
    """
    signed = f"{message_id}.{timestamp}.".encode() + body
    signatures = [
        "v1," + base64.b64encode(hmac.digest(_key_of(secret), signed, sha256)).decode()
        for secret in signing_secrets
    ]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(signatures),
    }


def _key_of(secret: str) -> bytes:
    return base64.b64decode(secret.removeprefix(PREFIX))
