"""Each malicious artefact is refused with a reason, runs nothing, and leaves the process small."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.artefacts import GGUFS, HARMLESS, REFUSED, canary_of
from worker.models.artifact_checks import take_in

MOST_MEGABYTES = 700  # a template may take a gigabyte of addresses before it is stopped
Json = dict[str, Any]  # Any: JSON
ROOT = Path(__file__).resolve().parents[2]


class Importer:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.importer"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, do: str, path: Path, out: Path) -> Json:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, "path": str(path), "out": str(out)}) + "\n")
        self.process.stdin.flush()
        answer: Json = json.loads(self.process.stdout.readline())
        return answer


@pytest.fixture(scope="module")
def importer() -> Iterator[Importer]:
    made = Importer()
    yield made
    made.process.communicate()


@pytest.fixture
def folder(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    shutil.copyfile(tiny_llama_dir / "model.safetensors", tmp_path / "secret.safetensors")
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


def test_the_sound_model_comes_in(importer: Importer, folder: Path, tmp_path: Path) -> None:
    answer = importer.ask("folder", folder, tmp_path / "out")
    assert answer["code"] == "", answer


@pytest.mark.parametrize("name", REFUSED)
def test_a_malicious_folder_is_refused(
    importer: Importer, folder: Path, tmp_path: Path, name: str
) -> None:
    REFUSED[name](folder)
    answer = importer.ask("folder", folder, tmp_path / "out")
    assert answer["code"] not in ("", "died", "fault"), answer
    assert answer["message"]
    assert answer["megabytes"] < MOST_MEGABYTES, answer
    assert not canary_of(folder).exists()


@pytest.mark.parametrize("name", HARMLESS)
def test_an_odd_folder_runs_nothing(
    importer: Importer, folder: Path, tmp_path: Path, name: str
) -> None:
    HARMLESS[name](folder)
    answer = importer.ask("folder", folder, tmp_path / "out")
    assert answer["code"] not in ("died", "fault"), answer
    assert not canary_of(folder).exists()


@pytest.mark.parametrize("name", GGUFS)
def test_a_lying_gguf_is_refused(importer: Importer, tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUFS[name])
    answer = importer.ask("gguf", path, tmp_path / "out")
    assert answer["code"] not in ("", "died", "fault"), answer
    assert answer["megabytes"] < MOST_MEGABYTES, answer


@pytest.mark.parametrize(
    "name",
    [
        "auto_map",
        "pickle for weights, protocol 2",
        "torch archive for weights",
        "weights cut short",
    ],
)
def test_a_serve_worker_does_not_load_it_either(
    importer: Importer, folder: Path, tmp_path: Path, name: str
) -> None:
    """As if it had got into the store past the import."""
    REFUSED[name](folder)
    answer = importer.ask("load", folder, tmp_path / "out")
    assert answer["code"] not in ("", "died", "fault"), answer
    assert not canary_of(folder).exists()


def test_the_canary_is_one(tmp_path: Path) -> None:
    """The pickles of the corpus do run code where pickles are read."""
    REFUSED["pickle beside"](tmp_path)
    code = f"import pickle; pickle.load(open({str(tmp_path / 'pytorch_model.bin')!r}, 'rb'))"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert canary_of(tmp_path).exists()


def test_a_file_swapped_for_a_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    from worker.models import artifact_checks

    (folder / "vocab.json").symlink_to("/etc/passwd")
    with pytest.raises(OSError, match="symbolic"):
        artifact_checks._copy_plain(folder / "vocab.json", tmp_path / "copied")
    assert take_in is artifact_checks.take_in
