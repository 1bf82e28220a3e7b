"""A TCP proxy in one link of the service, which can hold, drop, refuse or delay what passes."""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from typing import Any, Final

CHUNK_BYTES: Final = 65536
RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST


class Link:
    """One listener that passes connections on to `target`, a port of 127.0.0.1.

    Call it from any thread; each fault lasts until `heal`.
    """

    def __init__(self, name: str, target: int, loop: asyncio.AbstractEventLoop) -> None:
        self.name = name
        self.port = 0
        self._target = target
        self._loop = loop
        self._is_flowing = asyncio.Event()
        self._is_flowing.set()
        self._is_refusing = False
        self._delay_seconds = 0.0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self._drop(False)

    def blackhole(self) -> None:
        """Nothing arrives, nobody is told; new connections are taken and get no answer."""
        self._loop.call_soon_threadsafe(self._is_flowing.clear)

    def delay(self, seconds: float) -> None:
        """Every chunk waits so long before it is passed on."""
        self._delay_seconds = seconds

    def reset(self) -> None:
        """Ends all connections with RST, and every new one."""
        self._is_refusing = True
        self._loop.call_soon_threadsafe(self._drop, True)

    def cut(self) -> None:
        """Closes all connections in an orderly way, and every new one."""
        self._is_refusing = True
        self._loop.call_soon_threadsafe(self._drop, False)

    def heal(self) -> None:
        """Everything passes again; what a black hole has held arrives late."""
        self._is_refusing, self._delay_seconds = False, 0.0
        self._loop.call_soon_threadsafe(self._is_flowing.set)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        far_writer = None
        try:
            if self._is_refusing:
                _close(writer, with_reset=True)
                return
            await self._is_flowing.wait()
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
            self._writers.add(far_writer)
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        except (OSError, asyncio.CancelledError):  # either end is gone: so is the other
            pass
        finally:
            for side in (writer, far_writer):
                if side is not None:
                    self._writers.discard(side)
                    side.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(CHUNK_BYTES):
            if self._delay_seconds:
                await asyncio.sleep(self._delay_seconds)
            await self._is_flowing.wait()
            writer.write(chunk)
            await writer.drain()
        await self._is_flowing.wait()
        with contextlib.suppress(OSError, RuntimeError):
            writer.write_eof()

    def _drop(self, with_reset: bool) -> None:
        for writer in list(self._writers):
            _close(writer, with_reset=with_reset)


class Network:
    """All links, served by one thread."""

    def __init__(self) -> None:
        self.links: dict[str, Link] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxies", daemon=True)
        self._thread.start()

    def add(self, name: str, target: int) -> Link:
        link: Link = self._call(self._make(name, target))
        self.links[name] = link
        return link

    def heal(self) -> None:
        for link in self.links.values():
            link.heal()

    def close(self) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _make(self, name: str, target: int) -> Link:
        link = Link(name, target, self._loop)
        await link.listen()
        return link

    async def _end(self) -> None:
        for link in self.links.values():
            link.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _call(
        self, coroutine: Coroutine[Any, Any, Any]
    ) -> Any:  # Any: whatever the coroutine gives
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)


def _close(writer: asyncio.StreamWriter, *, with_reset: bool) -> None:
    peer = writer.get_extra_info("socket")
    if with_reset and peer is not None:
        with contextlib.suppress(OSError):
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        writer.transport.abort()
    else:
        writer.close()
