import errno
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from worker.disk import is_disk_full


@pytest.fixture
def small_files() -> Iterator[None]:
    """The kernel refuses longer files, in the way in which it refuses writes to a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_numpy(path: Path) -> None:
    with path.open("wb") as file:
        np.zeros(4096).tofile(file)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_and_a_full_quota_are_recognised(number: int) -> None:
    assert is_disk_full(OSError(number, "refused"))


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda path: path.write_bytes(bytes(4096)), id="python"),
        pytest.param(lambda path: save_file({"a": torch.zeros(4096)}, path), id="safetensors"),
        pytest.param(write_numpy, id="numpy"),
    ],
)
def test_a_refused_write_is_recognised_whoever_writes(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    with pytest.raises(Exception) as refused:  # noqa: PT011  # each library raises a type of its own
        write(tmp_path / "file")
    assert is_disk_full(refused.value)


def test_a_tokenizer_that_finds_no_room_is_recognised(
    tiny_llama_dir: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    request.getfixturevalue("small_files")
    with pytest.raises(Exception) as refused:  # noqa: PT011  # tokenizers raises a bare Exception
        tokenizer.save_pretrained(tmp_path)
    assert is_disk_full(refused.value)


def test_the_cause_of_an_error_counts() -> None:
    error = ValueError("the model cannot be saved")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert is_disk_full(error)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        FileNotFoundError(2, "gone"),
        ValueError("28"),
        OSError("no"),
    ],
)
def test_other_errors_are_no_full_disk(error: Exception) -> None:
    assert not is_disk_full(error)
