"""Resolves host names in threads of its own.

A name server that does not answer blocks a thread for many seconds. It must not block the threads
that other tasks use, and it must not delay the exit of the process. The threads of a
`ThreadPoolExecutor` would delay it, because the interpreter waits for them.
"""

import socket
import threading
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Final

MAX_THREADS: Final = 16

_requests: Final[SimpleQueue[tuple[Future[list[str]], str, int]]] = SimpleQueue()
_threads: Final[list[threading.Thread]] = []
_lock: Final = threading.Lock()


def get_addresses(host: str, port: int) -> Future[list[str]]:
    """Returns the future addresses of a host, the preferred first.

    The future fails with OSError or UnicodeError if the host cannot be resolved.
    """
    future: Future[list[str]] = Future()
    _requests.put((future, host, port))
    with _lock:
        if len(_threads) < MAX_THREADS:
            thread = threading.Thread(
                target=_resolve_requests, name=f"resolve-{len(_threads)}", daemon=True
            )
            thread.start()
            _threads.append(thread)
    return future


def _resolve_requests() -> None:
    while True:
        future, host, port = _requests.get()
        if not future.set_running_or_notify_cancel():
            continue
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            future.set_result(list(dict.fromkeys(str(place[4][0]) for place in found)))
        except Exception as error:  # noqa: BLE001  # the caller of `get_addresses` handles it
            future.set_exception(error)
