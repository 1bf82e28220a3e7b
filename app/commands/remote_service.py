"""HTTP connection of a command to a service, with the API key and errors in plain words."""

import email.utils
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final
from urllib.parse import quote, urlsplit

import httpx

from app.settings import Settings

TIMEOUT: Final = httpx.Timeout(60.0, connect=10.0)
MAX_WAIT_SECONDS: Final = 60.0
PATIENCE_SECONDS: Final = 120.0  # longer than a restart of the service takes
LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
Json = dict[str, Any]  # Any: JSON bodies of the API


class RemoteError(RuntimeError):
    """The service refuses a request, or cannot be reached. A retry of the command may help."""


@dataclass(frozen=True)
class Address:
    """URL and API key of a service."""

    url: str
    key: str

    @property
    def base_url(self) -> str:
        """The URL without the suffix /v1, which users of the OpenAI client may give."""
        return self.url.rstrip("/").removesuffix("/v1")


def find_address(settings: Settings, url: str | None, key: str | None) -> Address:
    """Returns the address of the service; by default that of the service on this machine.

    The operator's key in the data folder is only sent to this machine. Raises RemoteError.
    """
    address = url or f"http://{settings.host}:{settings.port}"
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RemoteError(f"{address!r} is not a URL; give one such as http://127.0.0.1:8400")
    path = settings.data_dir / "api_key"
    if not key and (url is None or parts.hostname in LOOPBACK) and path.is_file():
        key = path.read_text().strip()
    if not key:
        raise RemoteError("no API key: set STILLHOUSE_API_KEY, or give --api-key")
    return Address(address, key)


class RemoteService:
    """Client of one service. It may be used by several threads."""

    def __init__(self, address: Address) -> None:
        self.address = address
        headers = {"authorization": f"Bearer {address.key}"}
        self.http = httpx.Client(base_url=address.base_url, headers=headers, timeout=TIMEOUT)

    def __enter__(self) -> "RemoteService":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.http.close()

    def get(self, path: str) -> Json:
        """Returns a JSON object. Raises RemoteError."""
        return self._json("GET", path)

    def fetch(self, path: str) -> httpx.Response:
        """Returns the response to a GET request. An error status does not raise. Raises RemoteError."""
        return self._send("GET", path)

    def get_patiently(self, path: str) -> Json:
        """Like `get`, but waits up to PATIENCE_SECONDS for a service that does not answer."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return self.get(path)
            except RemoteError as error:
                is_down = isinstance(error.__cause__, httpx.TransportError)
                if not is_down or time.monotonic() > deadline:
                    raise
            time.sleep(1.0)

    def post(self, path: str, body: Json) -> Json:
        """Sends a JSON object and returns the response. Raises RemoteError."""
        return self._json("POST", path, json=body)

    def _json(self, method: str, path: str, **options: Any) -> Json:  # Any: options of httpx
        answer = self._send(method, path, **options)
        if answer.status_code != 200:
            raise refused(answer)
        return json_of(answer)

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:  # Any: as above
        try:
            return self.http.request(method, path, **options)
        except httpx.TransportError as error:
            raise unreachable(self.address, error) from error


def unreachable(address: Address, error: httpx.TransportError) -> RemoteError:
    """Returns the error for a service that does not answer."""
    return RemoteError(
        f"{address.base_url} does not answer ({type(error).__name__}); is the service running?"
    )


def refused(answer: httpx.Response) -> RemoteError:
    """Returns the error for a response that reports one. The body must have been read."""
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = (
            f"the response is {answer.status_code} without a message; is this a Stillhouse service?"
        )
    return RemoteError(f"{message} (HTTP {answer.status_code})")


def json_of(answer: httpx.Response) -> Json:
    """Returns the JSON object in a response. Raises RemoteError."""
    try:
        document = answer.json()
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise RemoteError(f"{answer.url} does not answer with JSON; is this a Stillhouse service?")
    return document


def retry_after(answer: httpx.Response) -> float | None:
    """Returns the seconds that the response asks to wait, at most MAX_WAIT_SECONDS."""
    value = answer.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        moment = email.utils.parsedate_tz(value)
        if moment is None:
            return None
        seconds = email.utils.mktime_tz(moment) - time.time()
    return min(max(seconds, 0.0), MAX_WAIT_SECONDS)


def model_path(model_id: str, *parts: str) -> str:
    """Returns the path of a model's route, with the id and the parts percent-encoded."""
    quoted = "/".join(quote(part, safe="/" if number else "") for number, part in enumerate(parts))
    return f"/v1/models/{quote(model_id, safe='')}" + (f"/{quoted}" if parts else "")


def sizes(num_bytes: float) -> str:
    """Returns a size in megabytes, for messages."""
    return f"{num_bytes / 1e6:,.1f} MB"
