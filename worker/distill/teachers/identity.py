"""Hashes that identify a teacher, and name the caches of its outputs."""

import hashlib
import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from app.contracts.distillation import Auto, TeacherPrecision
from worker.distill.teachers.quantized import package_version


def teacher_identity(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a hash of a teacher's weights and tokenizer."""
    return f"{folder_sha256(folder)}:{tokenizer_sha256(tokenizer)}"


def outputs_identity(identity: str, precision: TeacherPrecision | Auto) -> str:
    """Returns the hash of a teacher with the precision of its layers, on which outputs depend."""
    return (
        identity if precision == "auto" else f"{identity}:{precision}:{package_version(precision)}"
    )


def folder_sha256(folder: Path) -> str:
    """Returns a hash of a model folder's configuration and weights."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name}:{sha256}\n".encode())
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a hash of a tokenizer's vocabulary."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
