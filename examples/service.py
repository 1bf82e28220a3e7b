"""Clients of a service for the examples: that of the data folder, or one of their own."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from app.commands.demo import call, running_service
from app.local.embedded_servers import read_service

Json = dict[str, Any]  # Any: JSON bodies of the public API


@contextmanager
def service(data_dir: Path, console: Console) -> Iterator[httpx.Client]:
    """Yields a client of the service that runs from the data folder, or of a new one."""
    url = running_url(data_dir)
    if url is None:
        with running_service(data_dir, console) as client:
            yield client
        return
    console.print(f"Using the service at {url}", highlight=False)
    headers = {"Authorization": f"Bearer {(data_dir / 'api_key').read_text().strip()}"}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        yield client


def running_url(data_dir: Path) -> str | None:
    """Returns the URL of the service that runs from the data folder, or None."""
    if not (found := read_service(data_dir)):
        return None
    host = found["STILLHOUSE_HOST"].replace("0.0.0.0", "127.0.0.1")
    url = f"http://{host}:{found['STILLHOUSE_PORT']}"
    try:
        is_ready = httpx.get(f"{url}/health/ready", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:  # the address is that of a service that was killed
        return None
    return url if is_ready else None


def upload(client: httpx.Client, path: Path) -> str:
    with path.open("rb") as rows:
        request = {"files": {"file": (path.name, rows)}, "data": {"purpose": "fine-tune"}}
        return str(call(client, "POST", "/v1/files", **request)["id"])


def unfinished(client: httpx.Client, example: str) -> str | None:
    """Returns the id of a job of this example that was interrupted, or None.

    Its settings may differ from those of this run. A new job would only start after it.
    """
    found = jobs_of(client, example, {"queued", "running"})
    return str(found[0]["id"]) if found else None


def jobs_of(client: httpx.Client, example: str, statuses: Collection[str]) -> list[Json]:
    """Returns the jobs of this example with one of these statuses, the newest first."""
    asked = {"metadata[example]": example}
    jobs: list[Json] = call(client, "GET", "/v1/fine_tuning/jobs", params=asked)["data"]
    return [job for job in jobs if job["status"] in statuses]
