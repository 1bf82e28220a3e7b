"""Imports and loads strangers' files, each in a fork of one process that has the libraries loaded already.

A line `{"do", "path", "out"}` comes in, a line `{"code", "message", "megabytes", "seconds"}` goes out; code is "" for success,
"died" for a process that ended by a signal, and "fault" for an error that is none of ours.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests.worker.memory_sink import MemorySink
from worker.errors import WorkerError
from worker.import_model import import_model
from worker.protocol.import_spec import ImportSpec
from worker.serve.errors import ServeError
from worker.serve.loading import load_model

CPU_SECONDS = 60
Json = dict[str, Any]  # Any: JSON


def attempt(asked: Json) -> Json:
    reader, writer = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.dup2(2, 1)
        with os.fdopen(writer, "w") as pipe:
            pipe.write(json.dumps(judge(asked)))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = json.loads(pipe.read() or '{"code": "died", "message": "", "megabytes": 0}')
    _, status, _ = os.wait4(child, 0)
    answer["message"] += f" (status {status})" if status else ""
    return {**answer, "seconds": time.monotonic() - began}


def judge(asked: Json) -> Json:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, message = "", ""
    try:
        if asked["do"] == "load":
            load_model(Path(asked["path"]))
        else:
            spec = ImportSpec(format=asked["do"], source_path=Path(asked["path"]))
            import_model(spec, Path(asked["out"]), MemorySink())
    except (WorkerError, ServeError) as error:
        code, message = error.code, str(error)
    except BaseException as error:  # noqa: BLE001  # the very thing that is looked for
        code, message = "fault", f"{type(error).__name__}: {error}"[:500]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"code": code, "message": message, "megabytes": grown / 1024}


def main() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        answers.write(json.dumps(attempt(json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
