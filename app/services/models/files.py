"""Files of models and of checkpoints: lists and reads them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from app.db.session import transaction
from app.errors import NotFound
from app.services import model_registry
from app.services.files import READ_BYTES
from app.storage import store


@dataclass(frozen=True)
class StoredFile:
    """File of a model in the store. `name` is its path in the folder of the model."""

    model_id: str
    name: str
    size_bytes: int
    sha256: str
    store_key: str

    def read(self, span: range) -> Iterator[bytes]:
        """Opens the file, and returns an iterator over the bytes in `span`, in pieces.

        A local file that is deleted later can still be read to its end. Raises NotFound.
        """
        try:
            file = store().open(self.store_key)
        except FileNotFoundError:
            raise NotFound(
                f"the file {self.name!r} of the model {self.model_id!r} is no longer in the store; restore it from a backup",
                param="file_name",
            ) from None
        return _pieces(file, span)


def list_files(project_id: str, model_id: str) -> list[StoredFile]:
    """Returns the files of the model, alias or checkpoint with this id, sorted by name.

    Raises:
        NotFound: The project sees no such model, or the store has lost it.
        CorruptArtifact: The list of files in the store has changed.
    """
    with transaction() as session:
        resolved = model_registry.resolve(session, project_id, model_id)
    try:
        entries = store().list_folder(resolved.ref)
    except FileNotFoundError:
        raise NotFound(
            f"the files of the model {resolved.model_id!r} are no longer in the store; restore them from a backup",
            param="model",
        ) from None
    return [
        StoredFile(
            resolved.model_id,
            entry["path"],
            entry["bytes"],
            entry["sha256"],
            f"{resolved.ref.key}/{entry['path']}",
        )
        for entry in entries
    ]


def get_file(project_id: str, model_id: str, name: str) -> StoredFile:
    """Returns the file of a model with this name. Raises as `list_files` does.

    Raises NotFound also if the model has no such file, or the store has lost it.
    """
    for file in list_files(project_id, model_id):
        if file.name == name:
            break
    else:
        raise NotFound(
            f"the model {model_id!r} has no file {name!r}; GET /v1/models/{model_id}/files lists its files",
            param="file_name",
        )
    if not store().exists(file.store_key):
        raise NotFound(
            f"the file {name!r} of the model {model_id!r} is no longer in the store; restore it from a backup",
            param="file_name",
        )
    return file


def _pieces(file: IO[bytes], span: range) -> Iterator[bytes]:
    with file:
        file.seek(span.start)
        num_left = len(span)
        while num_left and (piece := file.read(min(READ_BYTES, num_left))):
            num_left -= len(piece)
            yield piece
