"""Names of the files that a model folder may contain. Only known, harmless files are accepted.

The API checks names when an upload begins. Import processes check names and contents.
"""

import re
from collections.abc import Iterable

WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
JSON_FILES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.json",
        "model.safetensors.index.json",
    }
)
TEXT_FILES = frozenset({"merges.txt", "vocab.txt", "chat_template.jinja"})
# A tokenizer needs all files of one of these sets.
TOKENIZERS = (
    {"tokenizer.json"},
    {"vocab.txt"},
    {"vocab.json", "merges.txt"},
)
# Files with a vocabulary. Their keys are tokens, which may be any string.
FREE_KEYS = frozenset({"tokenizer.json", "vocab.json"})
# Harmless files that are not copied.
IGNORED = re.compile(
    r"(README|LICEN[CS]E|NOTICE|COPYING|USE_POLICY)(\..*)?|.*\.md|\..*|_?manifest\.json|added_tokens\.json"
    r"|(tokenizer|spiece|sentencepiece\.bpe)\.model",
    re.IGNORECASE,
)
ARCHIVE = re.compile(r".*\.(tar|tar\.gz|tgz|zip)", re.IGNORECASE)
CAN_RUN_CODE = re.compile(
    r".*\.(bin|pt|pth|pkl|pickle|ckpt|py|pyc|so|dill|joblib|npy|npz|h5|keras)", re.IGNORECASE
)


def refusal_of(name: str) -> str | None:
    """Returns why a file could run code or is not known, or None if the name is allowed."""
    if CAN_RUN_CODE.fullmatch(name):
        return (
            f"{name} is refused: pickles, scripts and other files that can run code are never read; "
            "save the model as safetensors (model.save_pretrained does this) and leave this file out"
        )
    if not is_accepted(name) and not IGNORED.fullmatch(name):
        return (
            f"{name} is refused: a model folder may contain model*.safetensors and "
            f"{', '.join(sorted(JSON_FILES | TEXT_FILES))}; leave the rest out"
        )
    return None


def is_accepted(name: str) -> bool:
    """Returns whether a file of this name is copied into the model folder."""
    return WEIGHTS.fullmatch(name) is not None or name in JSON_FILES or name in TEXT_FILES


def missing_from(names: Iterable[str]) -> str | None:
    """Returns what a folder with these files lacks, or None if it can be a model."""
    present = set(names)
    if "config.json" not in present:
        return "config.json is missing: give a folder that save_pretrained wrote"
    if not any(WEIGHTS.fullmatch(name) for name in present):
        return "there are no safetensors weights (model.safetensors, or model-00001-of-0000N.safetensors with its index)"
    if not any(files <= present for files in TOKENIZERS):
        return "there is no tokenizer: add tokenizer.json, vocab.txt, or vocab.json with merges.txt"
    return None
