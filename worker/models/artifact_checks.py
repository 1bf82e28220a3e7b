"""Checks the files of an untrusted model before any library reads them.

Only plain safetensors and known JSON or text files are accepted.
"""

import json
import math
import os
import shutil
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.contracts.model_files import FREE_KEYS, WEIGHTS, is_accepted, missing_from, refusal_of
from worker.errors import BrokenFile, MissingFile, UnsafeFile

PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

MAX_HEADER_BYTES = 100 * 10**6
MAX_JSON_BYTES = 128 * 2**20
MAX_TEMPLATE_BYTES = 256 * 2**10
MAX_GROWTH = 64  # characters that a tokenizer's replacements may produce from one character
MAX_POST_PROCESSOR_BYTES = 64 * 2**10
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "I16": 2,
    "I32": 4,
    "I64": 8,
    "F16": 2,
    "BF16": 2,
    "F32": 4,
    "F64": 8,
}


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as described by the header of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def refuse_unknown_files(names: Iterable[str]) -> None:
    """Raises UnsafeFile for a file that could run code or that is not known."""
    for name in sorted(names):
        if (reason := refusal_of(name)) is not None:
            raise UnsafeFile(reason)


def accepted_names(names: Iterable[str]) -> list[str]:
    """Returns the names of a folder or repository that are accepted, sorted.

    Raises MissingFile if the configuration, the weights or the tokenizer is missing.
    """
    accepted = sorted(name for name in names if is_accepted(name))
    if (reason := missing_from(accepted)) is not None:
        raise MissingFile(reason)
    return accepted


def take_in(source: Path, target: Path) -> list[Path]:
    """Copies the accepted files of a folder into the new folder `target` and checks each copy.

    Returns the copies. Raises UnsafeFile, BrokenFile or MissingFile.
    """
    for entry in sorted(source.iterdir()):
        if entry.is_symlink():
            raise UnsafeFile(
                f"{entry.name} is a symbolic link; copy the files themselves (cp -rL) and import the copy"
            )
        if entry.is_dir() and not entry.name.startswith("."):
            raise UnsafeFile(f"{entry.name} is a folder; a model folder must only contain files")
    names = [entry.name for entry in source.iterdir() if not entry.is_dir()]
    refuse_unknown_files(names)
    target.mkdir(parents=True)
    files = []
    for name in accepted_names(names):
        copied = _copy_plain(source / name, target / name)
        check_file(copied)
        files.append(copied)
    return files


def check_file(path: Path) -> None:
    """Checks the content of one accepted file. Raises UnsafeFile or BrokenFile."""
    try:
        if path.suffix == ".safetensors":
            read_safetensors_header(path)
        elif path.suffix == ".json":
            _check_json(path)
    except BrokenFile as error:
        # Checked only for broken files: a valid safetensors file may start with the same bytes.
        with path.open("rb") as file:
            if file.read(4).startswith(PICKLES):
                raise UnsafeFile(
                    f"{path.name} is a pickle or an archive, despite its name"
                ) from error
        raise
    if path.name == "chat_template.jinja" and path.stat().st_size > MAX_TEMPLATE_BYTES:
        raise BrokenFile(f"{path.name} is longer than {MAX_TEMPLATE_BYTES} bytes")


def read_safetensors_header(path: Path) -> dict[str, TensorHeader]:
    """Returns the tensors of a safetensors file by name.

    Raises BrokenFile, also if their bytes do not fill the file without gaps and overlaps.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise BrokenFile(
                f"{path.name} is not a safetensors file, or it is truncated: its header is longer than the file"
            )
        header = _parse(file.read(length), path.name)
    header.pop("__metadata__", None)
    tensors: dict[str, TensorHeader] = {}
    ranges = []
    for name, entry in header.items():
        tensors[name], begin, end = _tensor(path.name, name, entry)
        ranges.append((begin, end))
    expected = 0
    for begin, end in sorted(ranges):
        if begin != expected:
            raise BrokenFile(
                f"{path.name}: tensors overlap or leave a gap at byte {min(begin, expected)} of the data"
            )
        expected = end
    if expected != size - 8 - length:
        raise BrokenFile(
            f"{path.name} is truncated or has extra data: the header describes {expected} bytes of data, "
            f"but there are {size - 8 - length}; copy or download it again"
        )
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a model folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if WEIGHTS.fullmatch(path.name))


def _tensor(file: str, name: str, entry: object) -> tuple[TensorHeader, int, int]:
    match entry:
        case {
            "dtype": str(dtype),
            "shape": list(shape),
            "data_offsets": [int(begin), int(end)],
        } if len(shape) <= 8 and all(type(n) is int and 0 <= n < 2**48 for n in shape):
            tensor = TensorHeader(dtype, tuple(shape))
        case _:
            raise BrokenFile(f"{file}: the header entry of tensor {name[:100]!r} is malformed")
    if dtype not in DTYPE_BYTES:
        raise BrokenFile(
            f"{file}: tensor {name[:100]!r} has type {dtype[:20]!r}; supported are {', '.join(DTYPE_BYTES)}"
        )
    if begin < 0 or end - begin != tensor.num_elements * DTYPE_BYTES[dtype]:
        raise BrokenFile(
            f"{file}: tensor {name[:100]!r} does not have the size that its shape requires"
        )
    return tensor, begin, end


def _check_json(path: Path) -> None:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise BrokenFile(f"{path.name} is longer than {MAX_JSON_BYTES} bytes")
    document = _parse(path.read_bytes(), path.name)
    if path.name == "tokenizer.json":
        check_growth(document)
    if path.name in FREE_KEYS:
        return
    weight_map = document.get("weight_map", {})
    shards = weight_map.values() if isinstance(weight_map, dict) else [None]
    if strange := [
        shard for shard in shards if not isinstance(shard, str) or not WEIGHTS.fullmatch(shard)
    ]:
        raise UnsafeFile(
            f"{path.name} refers to weights outside the folder: {str(strange[0])[:100]!r}"
        )
    found = {"auto_map", "custom_code"} & set(_keys(document))
    if found:
        raise UnsafeFile(
            f"{path.name} refers to custom code ({', '.join(sorted(found))}), which is never run; "
            "only models whose code is part of transformers can be imported"
        )
    template = document.get("chat_template")
    if template is not None and len(json.dumps(template)) > MAX_TEMPLATE_BYTES:
        raise BrokenFile(
            f"the chat template in {path.name} is longer than {MAX_TEMPLATE_BYTES} bytes"
        )


def check_growth(tokenizer: Mapping[str, Any]) -> None:  # Any: JSON
    """Raises BrokenFile for a tokenizer.json that can turn a short text into a very long one."""
    if (
        max(_growth(tokenizer.get(part)) for part in ("normalizer", "pre_tokenizer", "decoder"))
        > MAX_GROWTH
    ):
        raise BrokenFile(
            f"tokenizer.json: its replacements turn one character into more than {MAX_GROWTH}; use a tokenizer without them"
        )
    if len(json.dumps(tokenizer.get("post_processor"))) > MAX_POST_PROCESSOR_BYTES:
        raise BrokenFile(
            f"tokenizer.json: its post_processor is longer than {MAX_POST_PROCESSOR_BYTES} bytes"
        )


def _growth(part: object) -> float:
    """Returns an upper bound on the characters that nested replacements produce from one.

    Factors are multiplied, because each replacement acts on the output of the previous ones.
    """
    if isinstance(part, list):
        return math.prod(map(_growth, part))
    if not isinstance(part, dict):
        return 1.0
    below = math.prod(map(_growth, part.values()))
    if not isinstance(content := part.get("content"), str) or part.get("type") != "Replace":
        return below
    pattern = part.get("pattern")
    found = pattern.get("String") if isinstance(pattern, dict) else None
    # A regular expression may match the empty string between any two characters.
    shortest = len(found) if isinstance(found, str) else 0
    return below * max(1.0, len(content) / shortest if shortest else len(content) + 1.0)


def _parse(content: bytes, name: str) -> dict[str, Any]:  # Any: JSON
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BrokenFile(
            f"{name}: its JSON cannot be read ({type(error).__name__}); the file may be truncated"
        ) from error
    if not isinstance(document, dict):
        raise BrokenFile(f"{name}: a JSON object was expected")
    return document


def _keys(document: object) -> Iterator[str]:
    if isinstance(document, Mapping):
        for key, value in document.items():
            yield key
            yield from _keys(value)
    elif isinstance(document, list):
        for value in document:
            yield from _keys(value)


def _copy_plain(source: Path, target: Path) -> Path:
    """Copies a regular file; refuses links, pipes and devices.

    The check is made on the open file, so the file cannot be swapped between check and copy.
    """
    handle = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as reader, target.open("xb") as writer:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise UnsafeFile(f"{source.name} is not a regular file")
        shutil.copyfileobj(reader, writer, 2**20)
    return target
