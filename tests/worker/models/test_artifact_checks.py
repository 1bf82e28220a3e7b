"""Nothing that could run code comes in, whatever it is called, and no file that contradicts itself."""

import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import pytest

from worker.errors import BrokenFile, MissingFile, UnsafeFile, WorkerError
from worker.models.artifact_checks import check_file, read_safetensors_header, take_in


@pytest.fixture
def folder(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


class Bomb:
    """Leaves a file behind if anything unpickles it."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.canary),)


def write_safetensors(path: Path, header: object, data: bytes = b"") -> Path:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + data)
    return path


def tensor(begin: int, end: int, **changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]} | changes


def test_a_saved_model_comes_in_whole_and_without_its_readme(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text("hello")
    (folder / "_manifest.json").write_text("{}")
    names = {path.name for path in take_in(folder, tmp_path / "in")}
    assert names == {path.name for path in folder.iterdir()} - {"README.md", "_manifest.json"}
    assert all(
        (tmp_path / "in" / name).read_bytes() == (folder / name).read_bytes() for name in names
    )


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "model.pt",
        "x.PKL",
        "modeling_evil.py",
        "weights.ckpt",
        "a.npy",
        "x.so",
        "notes.xyz",
    ],
)
def test_a_stranger_is_refused_by_name(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).write_bytes(b"harmless")
    with pytest.raises(UnsafeFile, match=name):
        take_in(folder, tmp_path / "in")
    assert not (tmp_path / "in").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_under_a_good_name_is_refused_and_never_loaded(
    folder: Path, tmp_path: Path, name: str, protocol: int
) -> None:
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "canary"), protocol=protocol) * 30)
    with pytest.raises(UnsafeFile, match="pickle"):
        take_in(folder, tmp_path / "in")
    assert not (tmp_path / "canary").exists()


def test_a_torch_archive_under_a_good_name_is_refused(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(folder / "model.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", b"x" * 1000)
    with pytest.raises(UnsafeFile, match="archive"):
        take_in(folder, tmp_path / "in")


def test_a_sound_file_whose_length_looks_like_a_pickle_comes_in(tmp_path: Path) -> None:
    header = json.dumps({"t": tensor(0, 4), "__metadata__": {"pad": ""}})
    header = header.replace('"pad": ""', '"pad": "' + "x" * (0x280 - len(header)) + '"')
    path = write_safetensors(tmp_path / "model.safetensors", header.encode(), b"\0" * 4)
    assert path.read_bytes().startswith(b"\x80\x02")
    check_file(path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("key", ["auto_map", "custom_code"])
def test_a_configuration_that_names_code_is_refused_however_deep(
    folder: Path, tmp_path: Path, name: str, key: str
) -> None:
    document = json.loads((folder / name).read_text())
    document["nested"] = [{"deeper": {key: {"AutoModel": "evil--modeling.Evil"}}}]
    (folder / name).write_text(json.dumps(document))
    with pytest.raises(UnsafeFile, match=key):
        take_in(folder, tmp_path / "in")


def test_a_link_is_refused_even_to_a_good_file(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(UnsafeFile, match="symbolic link"):
        take_in(folder, tmp_path / "in")


def test_a_pipe_does_not_hang_the_import(folder: Path, tmp_path: Path) -> None:
    (folder / "merges.txt").unlink(missing_ok=True)
    os.mkfifo(folder / "merges.txt")
    with pytest.raises(UnsafeFile, match="regular"):
        take_in(folder, tmp_path / "in")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_part_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(MissingFile, match=name.split(".")[-1]):
        take_in(folder, tmp_path / "in")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"[" * 100_000, b"\xff\xfe", b"null"])
def test_broken_json_is_refused(folder: Path, tmp_path: Path, content: bytes) -> None:
    (folder / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(BrokenFile, match="tokenizer_config"):
        take_in(folder, tmp_path / "in")


def test_a_token_may_be_any_word(folder: Path, tmp_path: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["vocab"]["auto_map"] = 99_999
    (folder / "tokenizer.json").write_text(json.dumps(document))
    take_in(folder, tmp_path / "in")


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": tensor(0, 8)}, b"\0" * 4),
        ({"a": tensor(0, 8)}, b"\0" * 12),
        ({"a": tensor(0, 8), "b": tensor(4, 12)}, b"\0" * 12),
        ({"a": tensor(0, 8), "b": tensor(12, 16)}, b"\0" * 16),
        ({"a": tensor(0, 8, shape=[3])}, b"\0" * 8),
        ({"a": tensor(0, 8, shape=[-2])}, b"\0" * 8),
        ({"a": tensor(0, 8, shape=[True, 2])}, b"\0" * 8),
        ({"a": tensor(0, 8, dtype="EVIL")}, b"\0" * 8),
        ({"a": tensor(-8, 0)}, b""),
        ({"a": {"dtype": "F32"}}, b""),
        ({"a": tensor(0, 0, shape=[2**47, 2**47, 0])}, b"x"),
        (b"{" * 1000, b""),
        (b"[]", b""),
    ],
)
def test_a_safetensors_file_that_contradicts_itself_is_refused(
    tmp_path: Path, header: object, data: bytes
) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", header, data)
    with pytest.raises(BrokenFile, match=r"model\.safetensors"):
        read_safetensors_header(path)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_that_cannot_fit_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" * 100)
    with pytest.raises(BrokenFile, match="header"):
        read_safetensors_header(path)


def test_every_truncation_of_real_weights_is_noticed(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for size in (*range(64), *range(64, len(content), len(content) // 97), len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(WorkerError):
            check_file(path)
