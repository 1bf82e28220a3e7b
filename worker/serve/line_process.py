"""Child process that answers each line of JSON with one line of JSON.

Untrusted input may make a library hang, crash or use too much memory. In a child process with
limits, only the child ends.
"""

import json
import resource
import subprocess
import sys
from typing import Any

Json = dict[str, Any]  # Any: JSON


class LineProcess:
    """Child process `python -m MODULE`. It ends when its standard input is closed.

    It starts with the first `exchange`, or with `start`. The methods are not thread-safe.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the child process early, because it takes a while to be ready."""
        self._running()

    def exchange(self, message: Json) -> Json | None:
        """Sends a message and returns the answer, or None if the child ended before it answered.

        The next message starts a new child then.
        """
        child = self._running()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(message).encode() + b"\n")
            child.stdin.flush()
            answer: Json | None = json.loads(child.stdout.readline() or b"null")
        except BrokenPipeError:
            answer = None
        if answer is None:
            self.close()
        return answer

    def close(self) -> None:
        """Ends the child process, after the line in progress."""
        if self._child is not None:
            self._child.communicate()
            self._child = None

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._child is None or self._child.poll() is not None:
            self._child = subprocess.Popen(
                [sys.executable, "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # Ctrl-C in a terminal is for the worker only. The child ends when its input closes.
                start_new_session=True,
            )
        return self._child


def limit_memory(more_bytes: int) -> None:
    """Limits the memory of this process to what it uses now and `more_bytes` more."""
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more_bytes, used + more_bytes))
