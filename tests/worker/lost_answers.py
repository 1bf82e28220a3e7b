"""A link to Postgres in which the answer to a COMMIT gets lost."""

import contextlib
import socket
import threading
from urllib.parse import quote

from psycopg.conninfo import conninfo_to_dict


class LostAnswers:
    """A proxy to Postgres that, once armed, cuts the connection instead of passing on the answer to a COMMIT."""

    def __init__(self, database_url: str) -> None:
        place = conninfo_to_dict(database_url)
        self._host, self._port = str(place["host"]), int(place.get("port") or 5432)
        self._listener = socket.create_server(("127.0.0.1", 0))
        account = quote(str(place["user"])) + (
            f":{quote(str(p))}" if (p := place.get("password")) else ""
        )
        port = self._listener.getsockname()[1]
        self.url = f"postgresql://{account}@127.0.0.1:{port}/{place['dbname']}"
        self.is_armed = threading.Event()
        self.num_lost = 0
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        """Waits for the connections, which the clients must have closed."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = self._connect()
                for source, target in ((near, far), (far, near)):
                    self._threads.append(
                        threading.Thread(target=self._pump, args=(source, target, far))
                    )
                    self._threads[-1].start()

    def _connect(self) -> socket.socket:
        if not self._host.startswith("/"):
            return socket.create_connection((self._host, self._port))
        far = socket.socket(socket.AF_UNIX)
        far.connect(f"{self._host}/.s.PGSQL.{self._port}")
        return far

    def _pump(self, source: socket.socket, target: socket.socket, far: socket.socket) -> None:
        with source:
            with contextlib.suppress(OSError):
                while chunk := source.recv(65536):
                    if source is far and b"COMMIT\0" in chunk and self.is_armed.is_set():
                        self.is_armed.clear()
                        self.num_lost += 1
                        break
                    target.sendall(chunk)
            for end in (source, target):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
