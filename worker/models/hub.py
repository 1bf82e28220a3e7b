"""Downloads a model from a Hugging Face hub: only accepted files, all at one commit."""

import errno
import re
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from worker.errors import HubFailed
from worker.models.artifact_checks import accepted_names

SOURCE = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)
DISK_RESERVE_BYTES = 2**30
CARD = "README.md"
MAX_CARD_BYTES = 2**20
SLACK_BYTES = 2**20  # for metadata files of huggingface_hub


def fetch_from_hub(
    source: str,
    folder: Path,
    *,
    endpoint: str | None,
    token: str | None,
    on_progress: Callable[[int, int], None],
) -> str:
    """Downloads `org/name@revision` into the new folder and returns its commit hash.

    `endpoint` is the URL of the hub; None is the public Hugging Face hub.
    `on_progress(bytes_done, bytes_total)` is called about once per second, from another thread.

    Raises:
        HubFailed: The name is invalid, the hub refuses or fails, or the disk is too small.
        MissingFile: The repository lacks a file that a model needs.
    """
    match = SOURCE.fullmatch(source)
    if match is None:
        raise HubFailed(
            f"{source[:100]!r} is not a model on a hub; use the form hf:org/name@revision"
        )
    repository, revision = match["repository"], match["revision"] or "main"
    folder.mkdir(parents=True)
    with _explained(repository, revision, endpoint=endpoint, token=token):
        info = HfApi(endpoint=endpoint, token=token or False).model_info(
            repository, revision=revision, files_metadata=True, timeout=30
        )
        files = [file for file in info.siblings or () if "/" not in file.rfilename]
        sizes = {file.rfilename: file.size or 0 for file in files}
        names, commit = accepted_names(sizes), info.sha or revision
        if 0 < sizes.get(CARD, 0) <= MAX_CARD_BYTES:
            names.append(CARD)  # it names the licence
        total = sum(sizes[name] for name in names)
        if shutil.disk_usage(folder).free < 3 * total + DISK_RESERVE_BYTES:
            raise HubFailed(
                f"{repository} has {total / 1e9:.1f} GB; "
                "there is not enough disk space to download and convert it"
            )
        # Any: a path and a string
        where: dict[str, Any] = {"local_dir": folder, "endpoint": endpoint}
        with _Watch(folder, total, on_progress):
            for name in names:
                with _files_up_to(sizes[name] + SLACK_BYTES):
                    hf_hub_download(
                        repository, name, revision=commit, token=token or False, **where
                    )
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return commit


@contextmanager
def _explained(
    repository: str, revision: str, *, endpoint: str | None, token: str | None
) -> Iterator[None]:
    """Converts errors of huggingface_hub to HubFailed."""
    try:
        yield
    except GatedRepoError as error:
        raise HubFailed(
            f"{repository} is gated: accept its terms on the hub; {_token_advice(token)}"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubFailed(
            f"the hub has no model {repository}, or the import has no access to it: "
            f"{_token_advice(token)}"
        ) from error
    except RevisionNotFoundError as error:
        raise HubFailed(
            f"{repository} has no revision {revision}; give a branch, a tag or a commit"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.HTTPError, OSError) as error:
        if getattr(error, "errno", None) == errno.EFBIG:
            # `from None`, because `is_disk_full` would take EFBIG as a cause for a full disk.
            # Here it comes from the limit of `_files_up_to`.
            raise HubFailed(
                f"the files of {repository} are larger than the hub declares; the download was stopped"
            ) from None
        raise HubFailed(
            f"{repository} cannot be downloaded from {endpoint or 'the hub'} ({type(error).__name__}); "
            "check the connection, or download the model elsewhere and import the folder"
        ) from error


def _token_advice(token: str | None) -> str:
    if token:
        return "STILLHOUSE_HF_TOKEN of the train worker must have access to it"
    return (
        "set STILLHOUSE_HF_TOKEN on the train worker, and use an API key with the scope hub:token"
    )


@contextmanager
def _files_up_to(num_bytes: int) -> Iterator[None]:
    """Limits the size of files that this process writes while the block runs.

    Free disk space was checked against the sizes that the hub announced, so larger files must fail.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class _Watch:
    """Thread that reports the size of the folder while files are downloaded into it."""

    def __init__(self, folder: Path, total: int, on_progress: Callable[[int, int], None]) -> None:
        self.folder, self.total, self.on_progress = folder, total, on_progress
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        self.thread.join()

    def _poll(self) -> None:
        while not self.is_over.wait(1):
            self._report()
        self._report()

    def _report(self) -> None:
        done = 0
        for path in self.folder.rglob("*"):
            try:
                done += path.stat().st_size
            except FileNotFoundError:  # renamed since it was listed
                continue
        self.on_progress(min(done, self.total), self.total)
