"""`stillhouse models import --url`: which files are uploaded, and what is refused before."""

from pathlib import Path

import pytest

from app.commands.model_uploads import local_files, start_import
from app.commands.remote_service import Address, RemoteError, RemoteService


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files of a model, as far as names can tell."""
    sizes = {"model.safetensors": 300, "tokenizer.json": 200, "config.json": 100, "README.md": 250}
    for name, num_bytes in sizes.items():
        (tmp_path / name).write_bytes(b"x" * num_bytes)
    return tmp_path


def test_the_files_of_a_model_and_its_card_are_uploaded_the_smallest_first(folder: Path) -> None:
    (folder / ".gitattributes").write_text("not part of the model")
    (folder / "vocab.txt").symlink_to("/etc/passwd")
    names = [file.name for file in local_files(folder)]
    assert names == ["config.json", "tokenizer.json", "README.md", "model.safetensors"]


@pytest.mark.parametrize("name", ["model.gguf", "model.tar.gz", "model.ZIP"])
def test_a_file_is_uploaded_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert local_files(tmp_path / name) == [tmp_path / name]


def test_a_folder_that_is_no_model_is_refused(folder: Path) -> None:
    (folder / "run.py").write_text("")
    with pytest.raises(RemoteError, match=r"run\.py is refused"):
        local_files(folder)
    (folder / "run.py").unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(RemoteError, match="no tokenizer"):
        local_files(folder)
    with pytest.raises(RemoteError, match="is not a model"):
        local_files(folder / "missing")


def test_a_service_that_does_not_answer_is_a_clear_error(folder: Path) -> None:
    with (
        RemoteService(Address("http://127.0.0.1:9", "key")) as service,
        pytest.raises(RemoteError, match="is the service running"),
    ):
        start_import(service, str(folder), "tiny", lambda line: None)
