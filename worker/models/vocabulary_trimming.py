"""Removes tokens that a task does not use from a model and its tokenizer.

Texts that consist of kept tokens are encoded as before, because the removed rules of the tokenizer
never applied to them. Other texts are encoded with more and shorter tokens. The logits of the kept
tokens do not change.

V vocabulary, K kept tokens.
"""

import copy
import json
import shutil
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PretrainedConfig, PreTrainedModel

from worker.errors import UnsupportedModel
from worker.models.architectures import kind_of

ALGORITHMS: Final = ("BPE", "Unigram", "WordPiece")
ROUNDING: Final = 64  # matmuls are faster if the vocabulary is a multiple
KEPT_FILES: Final = ("chat_template.jinja", "chat_template.json", "special_tokens_map.json")
Json = dict[str, Any]  # Any: tokenizer.json, whose schema depends on the algorithm


def check_trimmable(config: PretrainedConfig, tokenizer_dir: Path) -> None:
    """Raises UnsupportedModel if the vocabulary of the model cannot be trimmed."""
    if kind_of(config) != "causal":
        raise UnsupportedModel(
            f"the vocabulary of a {config.model_type} model cannot be trimmed, only that of a causal model; "
            "leave student.vocabulary out"
        )
    algorithm = json.loads((tokenizer_dir / "tokenizer.json").read_text())["model"]["type"]
    if algorithm not in ALGORITHMS:
        raise UnsupportedModel(
            f"the vocabulary of a {algorithm} tokenizer cannot be trimmed, only that of {', '.join(ALGORITHMS)}; "
            "leave student.vocabulary out"
        )


def trim_vocabulary(
    model: PreTrainedModel, tokenizer_dir: Path, used: Collection[int], target: Path
) -> int:
    """Saves the model and its tokenizer with the used tokens only, and returns their number.

    Special tokens, bytes and single characters are always kept. `model` is changed, and `target` is
    replaced.

    Raises UnsupportedModel if the model or its tokenizer cannot be trimmed.
    """
    check_trimmable(model.config, tokenizer_dir)
    described: Json = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    vocab = _vocab(described["model"])
    num_ids = 1 + max([*vocab.values(), *(token["id"] for token in described["added_tokens"])])
    wanted = {token for token in used if token < num_ids} | _config_ids(model)
    kept = _kept_ids(described, vocab, wanted, num_ids)
    new_ids = {old: new for new, old in enumerate(kept)}
    _shrink(model, kept)
    _renumber_configs(model, new_ids)
    shutil.rmtree(target, ignore_errors=True)
    model.save_pretrained(target)
    text = json.dumps(_trimmed_tokenizer(described, new_ids), ensure_ascii=False)
    (target / "tokenizer.json").write_text(text)
    settings: Json = json.loads((tokenizer_dir / "tokenizer_config.json").read_text())
    if "added_tokens_decoder" in settings:
        decoder = settings["added_tokens_decoder"].items()
        settings["added_tokens_decoder"] = {str(new_ids[int(old)]): entry for old, entry in decoder}
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    for name in KEPT_FILES:
        if (tokenizer_dir / name).is_file():
            shutil.copyfile(tokenizer_dir / name, target / name)
    return len(kept)


def _vocab(model: Json) -> dict[str, int]:
    """Returns the tokens of the algorithm with their ids."""
    if model["type"] == "Unigram":
        return {piece: number for number, (piece, _) in enumerate(model["vocab"])}
    return dict(model["vocab"])


def _kept_ids(described: Json, vocab: dict[str, int], wanted: set[int], num_ids: int) -> list[int]:
    """Returns the ids to keep in ascending order, rounded up with the lowest other ids."""
    model = described["model"]
    prefix = model.get("continuing_subword_prefix") or ""
    basic = {number for token, number in vocab.items() if _is_basic(token, prefix)}
    kept = wanted | basic | {token["id"] for token in described["added_tokens"]}
    if model["type"] == "Unigram":
        kept.add(model["unk_id"])
    elif model.get("unk_token") in vocab:
        kept.add(vocab[model["unk_token"]])
    parts = _parts(model, vocab)
    kept = _with_parts(kept, parts)
    others = (number for number in range(num_ids) if number not in kept)
    while len(kept) % ROUNDING and (number := next(others, None)) is not None:
        kept = kept | _with_parts({number}, parts)
    return sorted(kept)


def _is_basic(token: str, prefix: str) -> bool:
    """Returns whether a token is one character or one byte. Every text can be written with these."""
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return is_byte or len(token.removeprefix(prefix)) == 1


def _merges(model: Json) -> list[tuple[str, str]]:
    """Returns the pairs of tokens that BPE joins. Other algorithms have none."""
    merges = model.get("merges", ())
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in pairs]


def _parts(model: Json, vocab: dict[str, int]) -> dict[int, list[int]]:
    """Returns for each token the tokens from which merges make it."""
    parts: defaultdict[int, list[int]] = defaultdict(list)
    for left, right in _merges(model):
        if left + right in vocab:
            parts[vocab[left + right]] += [vocab[left], vocab[right]]
    return parts


def _with_parts(kept: Iterable[int], parts: dict[int, list[int]]) -> set[int]:
    """Returns the tokens, their parts, the parts of these, and so on."""
    complete: set[int] = set()
    open_ids = list(kept)
    while open_ids:
        number = open_ids.pop()
        if number not in complete:
            complete.add(number)
            open_ids += parts.get(number, ())
    return complete


def _trimmed_tokenizer(described: Json, new_ids: dict[int, int]) -> Json:
    """Returns the contents of tokenizer.json with the kept tokens under their new ids."""
    trimmed = copy.deepcopy(described)
    model = trimmed["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in new_ids]
        model["unk_id"] = new_ids[model["unk_id"]]
    else:
        vocab = {token: new_ids[old] for token, old in model["vocab"].items() if old in new_ids}
        model["vocab"] = vocab
    if model["type"] == "BPE":
        merges = _merges(model)
        model["merges"] = [
            [left, right]
            for left, right in merges
            if left in vocab and right in vocab and left + right in vocab
        ]
    for token in trimmed["added_tokens"]:
        token["id"] = new_ids[token["id"]]
    _renumber_processor(trimmed.get("post_processor"), new_ids)
    return trimmed


def _renumber_processor(processor: Json | None, new_ids: dict[int, int]) -> None:
    """Renumbers the special tokens that a post-processor adds, in place."""
    if processor is None:
        return
    for inner in processor.get("processors", ()):
        _renumber_processor(inner, new_ids)
    for entry in processor.get("special_tokens", {}).values():
        entry["ids"] = [new_ids[old] for old in entry["ids"]]
    for name in ("sep", "cls"):
        if name in processor:
            token, old = processor[name]
            processor[name] = [token, new_ids[old]]


def _configs(model: PreTrainedModel) -> list[Any]:  # Any: configurations of two kinds
    return [model.config, model.generation_config]


def _id_fields(config: Any) -> dict[str, int | list[int]]:
    """Returns the fields of a configuration that hold token ids."""
    values = config.to_dict()
    return {
        name: value
        for name, value in values.items()
        if name.endswith("_token_id") and value is not None
    }


def _config_ids(model: PreTrainedModel) -> set[int]:
    values = [value for config in _configs(model) for value in _id_fields(config).values()]
    return {
        number
        for value in values
        for number in (value if isinstance(value, list) else [value])
        if number >= 0
    }


def _renumber_configs(model: PreTrainedModel, new_ids: dict[int, int]) -> None:
    for config in _configs(model):
        for name, value in _id_fields(config).items():
            if isinstance(value, list):
                setattr(config, name, [new_ids.get(old, old) for old in value])
            else:
                setattr(config, name, new_ids.get(value, value))


def _shrink(model: PreTrainedModel, kept: list[int]) -> None:
    """Removes the rows of other tokens from the embeddings and the head, in place.

    The kept rows move to the front, and the model's own method cuts off the rest. It knows which
    parts of its family depend on the vocabulary.
    """
    num_rows = model.get_input_embeddings().weight.shape[0]
    order_V = torch.tensor(kept + sorted(set(range(num_rows)) - set(kept)))
    parts = [model.get_input_embeddings(), model.get_output_embeddings()]
    tensors = [tensor for part in parts for tensor in part.parameters()]
    with torch.no_grad():
        for tensor in {tensor.data_ptr(): tensor for tensor in tensors}.values():
            tensor.copy_(tensor[order_V])
    model.resize_token_embeddings(len(kept), mean_resizing=False)
