"""Renders chat templates in a child process.

A chat template is untrusted: it may loop forever or use too much memory. In that case only the
child process ends.

`python -m worker.serve.text.template_process` is the child process. It reads one JSON object per
line and writes one per line, until its input is closed.
"""

import atexit
import json
import signal
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from worker.serve.errors import InvalidMessages
from worker.serve.line_process import LineProcess, limit_memory

CPU_SECONDS = 2.0  # per rendering; far more than a normal template needs
MEMORY_BYTES = 512 * 2**20  # in addition to what the child uses when it is ready
MOST_ENDS = 3  # children that a template may end before it is refused untried
MAX_CHARACTERS = 16 * 2**20  # of a rendered text
Turns = Sequence[Mapping[str, Any]]  # Any: JSON
Json = dict[str, Any]  # Any: JSON


class TemplateRenderer:
    """Renders chat templates for one worker process, by one child process.

    The child starts with the first template, or with `start`. `start` and `render` are thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = LineProcess("worker.serve.text.template_process")
        self._num_ends: Counter[str] = Counter()  # children that each template has ended

    def start(self) -> None:
        """Starts the child process early, because it takes a while to be ready."""
        with self._lock:
            self._process.start()

    def render(self, template: str, turns: Turns, names: Mapping[str, object]) -> str:
        """Returns the rendered messages, with the assistant's turn opened.

        Raises InvalidMessages if the template fails or exceeds its limits.
        """
        message = {"template": template, "turns": list(turns), "names": dict(names)}
        with self._lock:
            answer = None
            if self._num_ends[template] < MOST_ENDS:
                answer = self._process.exchange(message)
                self._num_ends[template] += answer is None
            if answer is None:
                raise InvalidMessages(
                    "the model's chat template takes too long or too much memory; import the model with a simpler one"
                )
        if "error" in answer:
            raise InvalidMessages(
                f"the model's chat template rejects these messages: {answer['error']}"
            )
        return str(answer["text"])

    def close(self) -> None:
        """Ends the child process, after the rendering that is in progress."""
        with self._lock:
            self._process.close()


def serve() -> None:
    """Renders templates until the input is closed.

    A template that takes too long ends this process by a signal.
    """
    # slow to import, but does not need torch
    from transformers.utils.chat_template_utils import render_jinja_template

    limit_memory(MEMORY_BYTES)
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
        try:
            (text,), _ = render_jinja_template(
                conversations=[asked["turns"]],
                chat_template=asked["template"],
                add_generation_prompt=True,
                **asked["names"],
            )
            if len(text) > MAX_CHARACTERS:
                raise ValueError(f"its output has {len(text)} characters")
            answer = {"text": text}
        except Exception as error:  # noqa: BLE001  # a template may raise any exception
            answer = {"error": str(error)[:300] or type(error).__name__}
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


RENDERER = TemplateRenderer()
atexit.register(RENDERER.close)

if __name__ == "__main__":
    serve()
