"""Samples of a running service: memory, descriptors and threads of each process, disk, and keys in Valkey."""

import contextlib
import json
import os
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import psutil
import psycopg
import redis

from tests.e2e.service import Service
from tests.soak.trend import Point

MIB: Final = 2**20
# Words of a command line, and the group whose figures its processes are added to.
GROUPS: Final = (
    ("app.commands.cli api", "api"),
    ("worker.main train", "train worker"),
    ("worker.main serve", "serve worker"),
    ("worker.serve.text.template_process", "template renderer"),
    ("valkey-server", "valkey"),
    ("postgres", "postgres"),
)
LONG_LIVED: Final = ("api", "train worker", "serve worker", "valkey")
FOLDERS: Final = ("store", "work", "valkey", "logs")


@dataclass(frozen=True)
class Figure:
    """One measured quantity. `tolerance` is the growth per hour that is accepted; None: it is not judged."""

    owner: str
    name: str
    tolerance: float | None
    why_not_judged: str = ""


SHARED_PAGES: Final = "other processes share its pages"
HISTORY: Final = "the history of jobs is kept"
# Figures of each process. Anonymous memory is what a leak adds to; PSS also rises when a process ends that
# shared library pages with this one, and RSS when Postgres touches more of its shared buffers.
PROCESS_FIGURES: Final = (
    Figure("", "anonymous memory, MiB", 10.0),
    Figure("", "PSS, MiB", None, SHARED_PAGES),
    Figure("", "RSS, MiB", None, SHARED_PAGES),
    Figure("", "descriptors", 3.0),
    Figure("", "threads", 3.0),
    Figure("", "processes", 1.0),
)
POSTGRES_DESCRIPTORS: Final = Figure(
    "postgres", "descriptors", None, "each backend keeps up to max_files_per_process files open"
)
OTHERS: Final = (
    Figure("disk", "store, MiB", 10.0),
    Figure("disk", "work, MiB", 10.0),
    Figure("disk", "valkey, MiB", 10.0),
    Figure("disk", "logs, MiB", None, HISTORY),
    Figure("disk", "database, MiB", None, HISTORY),
    Figure("valkey", "keys", 10.0),
    Figure("valkey", "used memory, MiB", 5.0),
    Figure("service", "processes", 1.0),
)


class Sampler:
    """Samples a service in a thread every `seconds`, between `start` and `stop`."""

    def __init__(self, service: Service, seconds: float) -> None:
        self._service, self._seconds = service, seconds
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler")
        self._began = time.monotonic()
        environment = json.loads((service.data_dir / "service.json").read_text())
        self._database_url = environment["STILLHOUSE_DATABASE_URL"]
        self._redis_url = environment["STILLHOUSE_REDIS_URL"]
        self.series: defaultdict[Figure, list[Point]] = defaultdict(list)
        self.first_pids = self.pids()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()

    def pids(self) -> dict[str, set[int]]:
        """Process ids of each long-lived group: they change when a process has been started again."""
        groups = self._groups()
        return {name: {process.pid for process in groups[name]} for name in LONG_LIVED}

    def num_runs(self) -> int:
        """Processes of jobs that are running now."""
        return len(self._service.processes("worker.train")) + len(
            self._service.processes("worker.import_model")
        )

    def _run(self) -> None:
        while True:
            self._sample()
            if self._is_over.wait(self._seconds):
                return

    def _sample(self) -> None:
        at = time.monotonic() - self._began
        groups = self._groups()
        for name, processes in groups.items():
            values = _process_values(processes)
            for figure in PROCESS_FIGURES:
                owned = replace(figure, owner=name)
                if (owned.owner, owned.name) == (
                    POSTGRES_DESCRIPTORS.owner,
                    POSTGRES_DESCRIPTORS.name,
                ):
                    owned = POSTGRES_DESCRIPTORS
                self.series[owned].append((at, values[figure.name]))
        values = self._other_values()
        values["processes"] = sum(map(len, groups.values())) - len(groups["postgres"])
        for other in OTHERS:
            self.series[other].append((at, values[other.name]))

    def _groups(self) -> defaultdict[str, list[psutil.Process]]:
        """The processes of the service by group; those of jobs, which end with them, are left out."""
        parent = psutil.Process(self._service.process.pid)
        groups = defaultdict(list, {"up": [parent]})
        for child in parent.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                line = " ".join(child.cmdline())
                name = next((name for words, name in GROUPS if words in line), None)
                if name is not None:
                    groups[name].append(child)
        return groups

    def _other_values(self) -> dict[str, float]:
        values = {
            f"{name}, MiB": _disk_bytes(self._service.data_dir / name) / MIB for name in FOLDERS
        }
        with psycopg.connect(self._database_url) as connection:
            row = connection.execute("SELECT pg_database_size(current_database())").fetchone()
        assert row is not None
        values["database, MiB"] = row[0] / MIB
        with redis.Redis.from_url(self._redis_url) as client:
            values["keys"] = float(client.dbsize())
            values["used memory, MiB"] = client.info("memory")["used_memory"] / MIB
        return values


def _process_values(processes: list[psutil.Process]) -> dict[str, float]:
    """Sums over the processes of a group; one that ends meanwhile is left out."""
    sums = dict.fromkeys((figure.name for figure in PROCESS_FIGURES), 0.0)
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            rollup = _rollup(process.pid)
            descriptors, threads = process.num_fds(), process.num_threads()
            sums["anonymous memory, MiB"] += rollup["Pss_Anon"] / MIB
            sums["PSS, MiB"] += rollup["Pss"] / MIB
            sums["RSS, MiB"] += rollup["Rss"] / MIB
            sums["descriptors"] += descriptors
            sums["threads"] += threads
            sums["processes"] += 1
    return sums


def _rollup(pid: int) -> dict[str, int]:
    """Bytes by name of /proc/PID/smaps_rollup. PSS counts a page that n processes share as 1/n."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}


def _disk_bytes(folder: Path) -> int:
    num_bytes = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                num_bytes += os.lstat(os.path.join(root, name)).st_blocks * 512
    return num_bytes
