"""Converts a fast tokenizer to the metadata of a GGUF file."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import AutoTokenizer

from worker.errors import BrokenFile, UnsupportedTokenizer
from worker.models.vocabulary import num_token_ids

Json = dict[str, Any]  # Any: parts of tokenizer.json

# Pre-tokenizer patterns of Qwen 2 and Llama 3. They differ in the number of digits per piece.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2, LLAMA3 = WORDS % "", WORDS % "{1,3}"
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
SPECIAL = ("bos", "eos", "unk", "pad", "sep")


@dataclass(frozen=True)
class Vocabulary:
    """All `tokenizer.*` metadata of a GGUF file."""

    model: str  # "gpt2" for byte-level BPE, "llama" for SentencePiece
    split: str  # llama.cpp's name of the pre-tokenizer
    tokens: list[str]
    types: list[int]
    merges: list[str]  # byte-level BPE only
    scores: list[float]  # SentencePiece only
    special_ids: dict[str, int]
    is_bos_added: bool
    is_space_prefixed: bool
    chat_template: str | None

    def add_to(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model == "llama":
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.is_space_prefixed)
        else:
            writer.add_token_merges(self.merges)
        for name, token_id in self.special_ids.items():
            getattr(writer, f"add_{name}_token_id")(token_id)
        writer.add_add_bos_token(self.is_bos_added)
        writer.add_add_eos_token(False)  # the model continues the prompt
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(folder: Path, num_rows: int) -> Vocabulary:
    """Reads the tokenizer of a model with `num_rows` embedding rows.

    Raises UnsupportedTokenizer, or BrokenFile if a token id has no embedding row.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    if not tokenizer.is_fast:
        raise UnsupportedTokenizer(
            "the tokenizer is not a fast tokenizer (tokenizer.json), which an export as GGUF needs"
        )
    if (num_ids := num_token_ids(tokenizer)) > num_rows:
        raise BrokenFile(
            f"the tokenizer has token ids up to {num_ids - 1} but the model has only {num_rows} embedding rows"
        )
    state: Json = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE":
        raise UnsupportedTokenizer(
            f"a tokenizer of type {state['model']['type']} cannot be exported as GGUF; only BPE can"
        )
    is_sentencepiece = bool(state["model"].get("byte_fallback"))
    tokens, types = _tokens(tokenizer, num_rows, is_sentencepiece=is_sentencepiece)
    merges = [(left, right) for left, right in state["model"]["merges"]]
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in SPECIAL}
    first = tokenizer("a")["input_ids"][:1]
    template = tokenizer.chat_template
    return Vocabulary(
        model="llama" if is_sentencepiece else "gpt2",
        split="default" if is_sentencepiece else split_of(state),
        tokens=tokens,
        types=types,
        merges=[f"{left} {right}" for left, right in merges],
        scores=_scores(tokens, merges) if is_sentencepiece else [],
        special_ids={name: token_id for name, token_id in ids.items() if token_id is not None},
        is_bos_added=ids["bos"] is not None and first == [ids["bos"]],
        is_space_prefixed=is_sentencepiece and _is_space_prefixed(state),
        chat_template=template.get("default") if isinstance(template, dict) else template,
    )


def split_of(state: Json) -> str:
    """Returns llama.cpp's name for the pre-tokenizer of a byte-level BPE tokenizer.

    Raises UnsupportedTokenizer if llama.cpp has no such pre-tokenizer.
    """
    before: Json = state["pre_tokenizer"] or {}
    steps: list[Json] = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    # llama.cpp does not normalise text, so NFC and no normaliser are treated alike.
    normalizer = (state["normalizer"] or {"type": "NFC"})["type"]
    *splits, last = steps
    has_regex = last.get("use_regex", True)
    if last.get("type") == "ByteLevel" and not last["add_prefix_space"] and normalizer == "NFC":
        match splits:
            case [] if has_regex:
                return "gpt-2"
            case [{"type": "Digits", "individual_digits": True}] if has_regex:
                return "smollm"
            case [
                {
                    "type": "Split",
                    "pattern": {"Regex": rule},
                    "behavior": "Isolated",
                    "invert": False,
                }
            ]:
                if rule == QWEN2 and not has_regex:
                    return "qwen2"
                if rule == LLAMA3 and not has_regex:
                    return "llama-bpe" if state["model"].get("ignore_merges") else "smaug-bpe"
    raise UnsupportedTokenizer(
        "the tokenizer splits text by a rule that GGUF does not support; supported are those of GPT-2, SmolLM, Qwen 2 "
        "and Llama 3. Leave `export` empty and use the safetensors folder"
    )


def _tokens(
    tokenizer: Any, num_rows: int, *, is_sentencepiece: bool
) -> tuple[list[str], list[int]]:
    """Returns the token and its type for each embedding row.

    Rows without a token get a placeholder of type UNUSED, which no text is split into.
    """
    by_id = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for i in range(num_rows):
        kind = TokenType.NORMAL
        if i not in by_id:
            kind = TokenType.UNUSED
        elif is_sentencepiece and i == tokenizer.unk_token_id:
            kind = TokenType.UNKNOWN
        elif i in added:
            kind = TokenType.CONTROL if added[i].special else TokenType.USER_DEFINED
        elif is_sentencepiece and BYTE_TOKEN.fullmatch(by_id[i]):
            kind = TokenType.BYTE
        tokens.append(by_id.get(i, f"[PAD{i}]"))
        types.append(int(kind))
    return tokens, types


def _scores(tokens: list[str], merges: list[tuple[str, str]]) -> list[float]:
    """Returns scores that make llama.cpp apply the merges in their order in the list.

    llama.cpp merges the pair with the highest score first.
    """
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _is_space_prefixed(state: Json) -> bool:
    """Returns whether a space is added before the text, and before text after a special token.

    Raises UnsupportedTokenizer if GGUF cannot express the rule.
    """
    normalizer: Json = state["normalizer"] or {}
    steps: list[Json] = normalizer.get("normalizers", [normalizer] if normalizer else [])
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefixed = {"type": "Prepend", "prepend": "▁"}
    if state["pre_tokenizer"] is None and steps in ([prefixed, replaced], [replaced]):
        return len(steps) == 2
    before: Json = state["pre_tokenizer"] or {}
    if (
        not steps
        and before.get("type") == "Metaspace"
        and before["replacement"] == "▁"
        and not before["split"]
        and before["prepend_scheme"] in ("always", "never")
    ):
        return bool(before["prepend_scheme"] == "always")
    raise UnsupportedTokenizer(
        "the tokenizer puts spaces before words in a way that GGUF cannot express; "
        "leave `export` empty and use the safetensors folder"
    )
