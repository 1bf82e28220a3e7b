"""Publishes a model on a Hugging Face hub: downloads it from the service and uploads it.

The upload uses the huggingface_hub package, which is part of the extra `hub`.
"""

import hashlib
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from app.commands.model_downloads import Pull
from app.commands.remote_service import RemoteError, RemoteService, model_path, refused
from app.model_card import CARD
from app.settings import Settings

REPOSITORY: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
REVISION: Final = re.compile(r"[A-Za-z0-9][\w./-]{0,199}", re.ASCII)

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Hub:
    """A hub and the token for it. If `endpoint` is None, it is the public Hugging Face Hub."""

    endpoint: str | None
    token: str | bool | None

    @classmethod
    def of(cls, settings: Settings, endpoint: str | None) -> "Hub":
        """Returns the hub that the command or the settings name.

        The token is STILLHOUSE_HF_TOKEN. For the public hub only, the one that `hf auth login` has
        stored is used otherwise.
        """
        url = endpoint or settings.hf_endpoint or None
        return cls(url, settings.hf_token or (None if url is None else False))


def push(
    service: RemoteService,
    model_id: str,
    repository: str,
    *,
    hub: Hub,
    revision: str | None,
    is_private: bool,
    data_dir: Path,
    tell: Tell,
) -> str:
    """Uploads a model to `org/name` on the hub, and returns the URL of the commit.

    The repository is created if it does not exist. Files of the repository that the model does not
    have remain. The downloaded copy is kept for another attempt if the upload fails.

    Raises RemoteError.
    """
    if not REPOSITORY.fullmatch(repository) or ".." in repository:
        raise RemoteError(f"{repository!r} is not a repository; use the form org/name")
    if revision is not None and (not REVISION.fullmatch(revision) or ".." in revision):
        raise RemoteError(f"{revision!r} is not the name of a branch; give one such as main")
    _require_library()
    if "@" in model_id:  # an alias may move during the push
        model_id = str(service.get(model_path(model_id)).get("id"))
    name = hashlib.sha256(f"{service.address.base_url} {model_id}".encode()).hexdigest()[:24]
    folder = data_dir / "pushes" / name
    files = Pull(service, folder, tell).run(model_id)
    if CARD not in {file.name for file in files}:
        card = service.fetch(model_path(model_id, "card"))
        if card.status_code == 200:
            (folder / CARD).write_bytes(card.content)
        elif card.status_code != 404:
            raise refused(card)
    tell(f"uploading {len(files)} files to {repository}")
    url = _upload(folder, repository, hub=hub, revision=revision, is_private=is_private)
    shutil.rmtree(folder)
    return url


def _require_library() -> None:
    try:
        import huggingface_hub  # noqa: F401 (only to learn whether it is installed)
    except ImportError:
        raise RemoteError(
            "a push needs huggingface_hub; install it with pip install 'stillhouse[hub]'"
        ) from None


def _upload(
    folder: Path, repository: str, *, hub: Hub, revision: str | None, is_private: bool
) -> str:
    import httpx2
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    if hub.endpoint is not None:
        # Xet is the storage of the public hub. Other hubs have the LFS protocol.
        constants.HF_HUB_DISABLE_XET = True
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    try:
        api.create_repo(repository, private=is_private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            commit_message="Upload a model from Stillhouse",
            ignore_patterns=["*.part"],
        )
    except (HfHubHTTPError, httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        advice = "run the command again; the downloaded copy is kept"
        if status in (401, 403):
            advice = "set STILLHOUSE_HF_TOKEN to a token that may write to the repository"
        raise RemoteError(
            f"{repository} cannot be uploaded to {hub.endpoint or 'the hub'} "
            f"({type(error).__name__}{f', HTTP {status}' if status else ''}): {str(error)[:300]}; {advice}"
        ) from error
    return str(commit.commit_url)
