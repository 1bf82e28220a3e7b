"""HTTP connection of a command to a service, with the API key and errors in plain words."""

import email.utils
import json
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final
from urllib.parse import quote, urlsplit

import httpx

from app.commands.shell import Json
from app.settings import Settings

TIMEOUT: Final = httpx.Timeout(60.0, connect=10.0)
ANSWER_TIMEOUT: Final = httpx.Timeout(600.0, connect=10.0)  # as long as a request may take
MAX_WAIT_SECONDS: Final = 60.0
RETRY_SECONDS: Final = (0.3, 2.0)  # waits before the second and the third attempt
PATIENCE_SECONDS: Final = 120.0  # longer than a restart of the service takes
TEMPORARY_STATUSES: Final = frozenset({429, 502, 503, 504})
LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
KEY: Final = re.compile(r"[\x21-\x7e]+")
ALL_ADDRESSES: Final = frozenset({"0.0.0.0", "::", ""})
Query = Mapping[str, str | int | float | list[str] | None]


class RemoteError(RuntimeError):
    """The service refuses a request, or cannot be reached. A retry of the command may help."""


class TemporaryError(RemoteError):
    """The service cannot be reached or cannot answer now. The same request may succeed later."""


@dataclass(frozen=True)
class Address:
    """URL and API key of a service."""

    url: str
    key: str

    @property
    def base_url(self) -> str:
        """The URL without the suffix /v1, which users of the OpenAI client may give."""
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def is_local(self) -> bool:
        """True if the service listens on this machine, where no proxy is needed."""
        return urlsplit(self.url).hostname in LOOPBACK


def find_address(settings: Settings, url: str | None, key: str | None) -> Address:
    """Returns the address of the service; by default that of the service on this machine.

    The operator's key in the data folder is only sent to this machine. Raises RemoteError.
    """
    found = Address(_checked(url or running_url(settings)), (key or "").strip())
    path = settings.data_dir / "api_key"
    if not found.key and (url is None or found.is_local):
        try:
            found = Address(found.url, path.read_text().strip())
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            raise RemoteError(
                f"the API key in {path} cannot be read ({error}); give --key"
            ) from error
    if not found.key and url is None:
        raise RemoteError(
            f"no service runs from {settings.data_dir.resolve()}: run `stillhouse up`, give --data-dir, "
            "or set STILLHOUSE_URL and STILLHOUSE_API_KEY"
        )
    if not found.key:
        raise RemoteError("no API key: set STILLHOUSE_API_KEY, or give --key")
    if not KEY.fullmatch(found.key):
        raise RemoteError("the API key has characters that no key has; give it as it was printed")
    return found


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL):  # for example, the port is not a number
        is_url = False
    if not is_url:
        raise RemoteError(f"{url!r} is not a URL; give one such as http://127.0.0.1:8400")
    return url


def running_url(settings: Settings) -> str:
    """Returns the URL of the service that runs from the data folder, or else of the settings."""
    from app.local.embedded_servers import read_service

    running = read_service(settings.data_dir)
    port = int(running.get("STILLHOUSE_PORT", settings.port))
    return local_url(running.get("STILLHOUSE_HOST", settings.host), port)


def local_url(host: str, port: int) -> str:
    """Returns the URL at which this machine reaches a server that listens on `host`."""
    host = "127.0.0.1" if host in ALL_ADDRESSES else host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class RemoteService:
    """Client of one service. It may be used by several threads. All methods raise RemoteError.

    Requests that can be repeated without harm are sent up to three times if the service cannot
    answer.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        headers = {"authorization": f"Bearer {address.key}"}
        try:
            self.http = httpx.Client(
                base_url=address.base_url,
                headers=headers,
                timeout=TIMEOUT,
                trust_env=not address.is_local,
            )
        except (ImportError, ValueError) as error:
            raise RemoteError(
                f"the proxy in the environment cannot be used ({error}); unset it, or set NO_PROXY"
            ) from error

    def __enter__(self) -> "RemoteService":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.http.close()

    def get(self, path: str, query: Query | None = None) -> Json:
        """Returns a JSON object."""
        params = {name: value for name, value in (query or {}).items() if value is not None}
        return json_of(self._repeatedly("GET", path, params=params))

    def fetch(self, path: str) -> httpx.Response:
        """Returns the response to a GET request. An error status does not raise."""
        return self._send("GET", path)

    def get_patiently(self, path: str) -> Json:
        """Like `get`, but waits up to PATIENCE_SECONDS for a service that cannot answer."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return json_of(self._succeed("GET", path))
            except TemporaryError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(1.0)

    def post(self, path: str, body: Json | None = None, *, is_long: bool = False) -> Json:
        """Sends a JSON object, or no body, and returns the response.

        With `is_long`, it waits for the response as long as a model may take for an answer.
        """
        timeout = ANSWER_TIMEOUT if is_long else TIMEOUT
        return json_of(self._succeed("POST", path, json=body, timeout=timeout))

    def create(self, path: str, body: Json) -> Json:
        """Like `post`, for routes that accept an idempotency key. Repeats the request if needed."""
        headers = {"idempotency-key": secrets.token_hex(16)}
        return json_of(self._repeatedly("POST", path, json=body, headers=headers))

    def put(self, path: str, body: Json) -> Json:
        """Sends a JSON object and returns the response."""
        return json_of(self._succeed("PUT", path, json=body))

    def delete(self, path: str) -> Json:
        """Deletes an object and returns the confirmation."""
        return json_of(self._succeed("DELETE", path))

    def stream(
        self, method: str, path: str, *, body: Json | None = None, query: Query | None = None
    ) -> Iterator[Json]:
        """Yields the JSON objects of a stream of server-sent events, up to [DONE].

        An error within the stream is raised, and so is a stream that ends without [DONE].
        """
        options: Json = {"json": body, "params": query, "timeout": ANSWER_TIMEOUT}
        try:
            with self.http.stream(method, path, **options) as answer:
                if not answer.is_success:
                    answer.read()
                    raise refused(answer)
                for line in answer.iter_lines():
                    name, _, data = line.partition(":")
                    if name != "data":
                        continue
                    if data.strip() == "[DONE]":
                        return
                    yield _event_of(data)
        except httpx.RequestError as error:
            raise unreachable(self.address, error) from error
        except httpx.InvalidURL as error:
            raise RemoteError(
                f"the request has no valid URL ({error}); is the id correct?"
            ) from error
        raise TemporaryError("the stream of the service ended early; run the command again")

    def _repeatedly(self, method: str, path: str, **options: Any) -> httpx.Response:  # Any: below
        for seconds in RETRY_SECONDS:
            try:
                return self._succeed(method, path, **options)
            except TemporaryError:
                time.sleep(seconds)
        return self._succeed(method, path, **options)

    def _succeed(self, method: str, path: str, **options: Any) -> httpx.Response:  # Any: below
        answer = self._send(method, path, **options)
        if not answer.is_success:
            raise refused(answer)
        return answer

    def _send(
        self, method: str, path: str, **options: Any
    ) -> httpx.Response:  # Any: options of httpx
        try:
            return self.http.request(method, path, **options)
        except httpx.RequestError as error:
            raise unreachable(self.address, error) from error
        except httpx.InvalidURL as error:
            raise RemoteError(
                f"the request has no valid URL ({error}); is the id correct?"
            ) from error


def unreachable(address: Address, error: httpx.RequestError) -> RemoteError:
    """Returns the error for a service that does not answer, or not as HTTP."""
    return TemporaryError(
        f"{address.base_url} does not answer ({type(error).__name__}); is the service running?"
    )


def refused(answer: httpx.Response) -> RemoteError:
    """Returns the error for a response that reports one. The body must have been read."""
    try:
        error = answer.json()["error"]
        message, code = str(error["message"]), error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        code = None
        message = (
            f"the response is {answer.status_code} without a message; is this a Stillhouse service?"
        )
    if code == "unknown_url":
        route = f"{answer.request.method} {answer.request.url.path}"
        message = f"the service does not have {route}: it is older than this command; upgrade it"
    if answer.status_code == 401:
        message += "; set STILLHOUSE_API_KEY, or give --key"
    kind = TemporaryError if _is_temporary(answer) else RemoteError
    return kind(f"{message} (HTTP {answer.status_code})")


def _is_temporary(answer: httpx.Response) -> bool:
    advice = answer.headers.get("x-should-retry")
    return advice == "true" or (advice != "false" and answer.status_code in TEMPORARY_STATUSES)


def _event_of(data: str) -> Json:
    try:
        event = json.loads(data)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise RemoteError("the service streams no JSON; is this a Stillhouse service?")
    if isinstance(event.get("error"), dict):
        raise RemoteError(str(event["error"].get("message")))
    return event


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


def object_path(collection: str, object_id: str, *parts: str) -> str:
    """Returns the path of an object's route, with the id percent-encoded."""
    return "/".join((collection, quote(object_id, safe=""), *parts))


def sizes(num_bytes: float) -> str:
    """Returns a size in megabytes, for messages."""
    return f"{num_bytes / 1e6:,.1f} MB"
