"""The least time a step's matrix products take on this machine now: `python -m bench.floor TASK.json`.

A step of the student needs, for each of its linear layers and rows it sees, the forward product and (backward) those
for the input's and the weight's gradient: 2 * rows * inputs * outputs FLOPs each. For every loss row the head needs the
student's logits, the gradient in the hidden state, the teacher's logits, and, where it is trained, the gradient in its
weight. A live teacher adds the forward products of its own layers. The products inside attention are left out, which
makes the floor lower and the fraction worse. Each product is timed at its own shape by MKL and by oneDNN, and the faster
one counts: what a machine gives to whoever does not write products himself. Where the processor has tiles our own
float32 product is timed, too, for a floor of its own.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bench.cases import Entry
from bench.plain import load, tensors
from worker.cpu import linear_ops
from worker.cpu.kernels.bindings import kernels

Shape = tuple[int, int, int]  # rows, inner, columns of one product
Kind = tuple[str, Shape]
MEASURED_SECONDS = 0.3
MIN_REPEATS = 3


def layers_of(model: Any, arguments: Entry) -> list[tuple[int, int, int]]:
    """Rows, inputs and outputs of each linear layer but the head, as one batch runs through them."""
    found: list[tuple[int, int, int]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        found.append((args[0].numel() // args[0].shape[-1], args[0].shape[-1], output.shape[-1]))

    head = model.get_output_embeddings()
    hooks = [
        module.register_forward_hook(note)
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    with torch.no_grad():
        model(**arguments)
    for hook in hooks:
        hook.remove()
    return found


def products_of(task: Entry, contender: Entry, layers: Entry) -> Counter[Kind]:
    """How often a step needs each product."""
    products: Counter[Kind] = Counter()
    for rows, inputs, outputs in layers["student"]:
        products["forward", (rows, inputs, outputs)] += 1
        products["gradient in x", (rows, outputs, inputs)] += 1
        products["gradient in W", (outputs, rows, inputs)] += 1
    if contender["teacher"] == "live":
        for shape in layers["teacher"]:
            products["forward", shape] += 1
    rows, width, vocabulary = layers["num_targets"], layers["hidden_size"], task["num_tokens"]
    products["forward", (rows, width, vocabulary)] += 1 if contender["teacher"] == "expected" else 2
    products["gradient in x", (rows, vocabulary, width)] += 1
    if contender["trains_head"]:
        products["gradient in W", (vocabulary, rows, width)] += 1
    return products


def seconds_of(kind: Kind) -> Entry:
    """Of one product: by MKL, by oneDNN, and by tiles where there are any."""
    name, (rows, inner, columns) = kind
    a = torch.randn(inner, rows).t() if name == "gradient in W" else torch.randn(rows, inner)
    b = torch.randn(columns, inner) if name == "forward" else torch.randn(inner, columns).t()
    ways: dict[str, Callable[[], Tensor]] = {"mkl": lambda: a @ b.t()}
    if name == "gradient in W":
        ways["onednn"] = lambda: linear_ops.onednn_weight_gradient(a.t(), b.t())
    else:
        ways["onednn"] = lambda: linear_ops.onednn_product(a, b)
    if (ops := kernels()) is not None and ops.has_splits:
        ways["tiles"] = lambda: ops.multiply_split(a, b)
    return {way: best_seconds(multiply) for way, multiply in ways.items()}


def best_seconds(multiply: Callable[[], Tensor]) -> float:
    multiply()
    seconds: list[float] = []
    while len(seconds) < MIN_REPEATS or sum(seconds) < MEASURED_SECONDS:
        begun = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def floors(task: Entry) -> Entry:
    """For each contender of ours the FLOPs of a step and their least seconds."""
    torch.set_num_threads(task["num_threads"])
    rows = json.loads(Path(task["rows_path"]).read_text())["rows"]
    arguments, keep_BT = tensors([rows[i] for i in task["batches"][0]])
    layers: Entry = {"num_targets": int(keep_BT.sum())}
    for side in ("student", "teacher"):
        model = load(task[f"{side}_dir"])
        layers[side] = layers_of(model, arguments)
        if side == "student":
            layers["hidden_size"] = model.get_output_embeddings().weight.shape[1]
        del model
    needed = {c["name"]: products_of(task, c, layers) for c in task["contenders"]}
    timed = {
        kind: seconds_of(kind) for kind in sorted({k for needs in needed.values() for k in needs})
    }
    libraries = {kind: min(ways["mkl"], ways["onednn"]) for kind, ways in timed.items()}
    rates = [_flops(kind) / seconds for kind, seconds in libraries.items()]
    contenders = {
        name: {
            "flop": sum(count * _flops(kind) for kind, count in needs.items()),
            "seconds": sum(count * libraries[kind] for kind, count in needs.items()),
            "own_seconds": sum(count * min(timed[kind].values()) for kind, count in needs.items()),
        }
        for name, needs in needed.items()
    }
    table = [
        {"matmul": name, "shape": shape}
        | {f"{way}_gflops": round(_flops((name, shape)) / s / 1e9) for way, s in ways.items()}
        for (name, shape), ways in timed.items()
    ]
    return {"contenders": contenders, "best_gflops": round(max(rates) / 1e9, 1), "products": table}


def _flops(kind: Kind) -> int:
    rows, inner, columns = kind[1]
    return 2 * rows * inner * columns


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    Path(task["answer"]).write_text(json.dumps(floors(task)))


if __name__ == "__main__":
    main()
