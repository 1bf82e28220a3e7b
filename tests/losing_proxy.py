"""TCP proxy that records requests and can lose responses."""

import contextlib
import socket
import threading


class LosingProxy:
    """Forwards connections to the API, but closes them instead of sending `num_lost` responses."""

    def __init__(self, url: str, num_lost: int) -> None:
        self.upstream, self.num_lost = ("127.0.0.1", int(url.rpartition(":")[2])), num_lost
        self.requests: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        with client, socket.create_connection(self.upstream) as server:
            threading.Thread(target=self._up, args=(client, server), daemon=True).start()
            while piece := server.recv(65536):
                if self.num_lost:
                    self.num_lost -= 1
                    break
                client.sendall(piece)
            for end in (client, server):  # `close` alone does not end the other thread's `recv`
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := client.recv(65536):
                self.requests.append(piece)
                server.sendall(piece)
