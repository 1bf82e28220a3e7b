"""Sizes of models for estimates: numbers of parameters by part, read from the shapes of tensors.

Names and shapes are in the headers of safetensors files, so no weights are read. The API reads the
headers from the store, and a run reads them from its folders.

H hidden width, F width of the feed-forward part, V vocabulary.
"""

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import IO, Any, Final

from app.contracts.distillation import FreshConfig, Lora, Student
from app.contracts.messages import ModelFacts

Shapes = Mapping[str, tuple[int, ...]]
Json = dict[str, Any]  # Any: a model's config.json

LAYER: Final = re.compile(r"^(.*?)\.(\d+)\.")
HEAD: Final = re.compile(r"(^|\.)(lm_head|embed_out|predictions\.decoder)\.weight$")
HEADS: Final = ("num_attention_heads", "n_head", "num_heads", "decoder_attention_heads")
BUFFER: Final = "final_logits_bias"  # a buffer that BART stores with its weights
# Architectures with layer norms. Their MLPs have no gate. The others are Llama-like, or T5.
LAYER_NORMED: Final = frozenset(
    ("bart", "bert", "bloom", "gpt2", "gpt_neox", "opt", "roberta", "starcoder2")
)
JOINED: Final = frozenset(("bloom", "gpt2", "gpt_neox", "phi3"))
DEFAULT_ACTIVATIONS: Final = {"gpt2": "gelu_new", "opt": "relu", "bloom": "gelu", "bart": "gelu"}
MAX_HEADER_BYTES: Final = 100 * 10**6


@dataclass(frozen=True)
class LayerStack:
    """Layers of an encoder, of a decoder, or of a model that has only one stack.

    attention_parameters, mlp_parameters: Per layer, on average. Norms count as attention.
    linear_width: Sum of the inputs and outputs of a layer's matrices.
    """

    num_layers: int
    attention_parameters: int
    mlp_parameters: int
    linear_width: int

    @property
    def num_parameters(self) -> int:
        return self.num_layers * (self.attention_parameters + self.mlp_parameters)


@dataclass(frozen=True)
class LayerKind:
    """Properties of layers on which the memory of their activations depends.

    activation: Name of the activation function in transformers.
    has_rms_norm: Otherwise the norms are layer norms.
    is_gated: The MLP is `down(act(gate(x)) * up(x))`. Otherwise it is `down(act(up(x)))`.
    is_joined: One matrix computes queries, keys and values.
    has_position_bias: The attention adds a bias per head to its scores.
    """

    activation: str = "silu"
    has_rms_norm: bool = True
    is_gated: bool = True
    is_joined: bool = False
    has_position_bias: bool = False


@dataclass(frozen=True)
class ModelSizes:
    """Parameters of a model by part. `stacks` is the encoder and the decoder, or the only stack.

    table_parameters: Embeddings and everything else outside the layers, without the LM head.
    encoder_parameters: The part of `table_parameters` that belongs to the encoder alone.
    head_parameters: The LM head, H x V.
    is_tied: The LM head shares its matrix with the embedding, which counts in `head_parameters`.
    guess_reason: Why the sizes are approximate; empty if they were read from the tensors.
    kinds: The kind of layer of each stack, or the only kind of all stacks.
    """

    stacks: tuple[LayerStack, ...]
    table_parameters: int
    head_parameters: int
    is_tied: bool
    hidden_size: int
    mlp_size: int
    num_heads: int
    encoder_parameters: int = 0
    guess_reason: str = ""
    kinds: tuple[LayerKind, ...] = (LayerKind(),)

    @property
    def layer_parameters(self) -> int:
        return sum(stack.num_parameters for stack in self.stacks)

    @property
    def num_layers(self) -> int:
        return sum(stack.num_layers for stack in self.stacks)

    @property
    def num_parameters(self) -> int:
        return self.layer_parameters + self.table_parameters + self.head_parameters

    @property
    def num_bytes(self) -> int:
        """Size in float32."""
        return 4 * self.num_parameters

    @property
    def vocab_size(self) -> int:
        return self.head_parameters // self.hidden_size

    @property
    def kv_size(self) -> int:
        """Width of a layer's keys: less than H with grouped-query attention.

        Queries and outputs are taken to have the width H. The rest of the attention is two norms,
        keys and values.
        """
        H = self.hidden_size
        if len(self.stacks) > 1:  # a decoder's layer has two attentions
            return H
        width = (self.stacks[-1].attention_parameters - 2 * H * H - 2 * H) // (2 * H)
        return min(H, max(H // self.num_heads, width))

    def with_layers(self, num_layers: int | None, num_encoder_layers: int | None) -> "ModelSizes":
        """Returns the sizes with other numbers of layers. None keeps a number."""
        *encoder, decoder = self.stacks
        stacks = [
            replace(stack, num_layers=num_encoder_layers or stack.num_layers) for stack in encoder
        ]
        stacks.append(replace(decoder, num_layers=num_layers or decoder.num_layers))
        return replace(self, stacks=tuple(stacks))


def read_shapes(file: IO[bytes]) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes in the header of a safetensors file. Raises ValueError."""
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise ValueError("not a safetensors file")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def measure_model(shapes: Shapes, config: Json) -> ModelSizes:
    """Returns the sizes of a model from its tensors and its config.json.

    Raises ValueError if it has no layers or no embedding.
    """
    layers: dict[str, dict[int, list[tuple[int, ...]]]] = {}
    outside: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if name == BUFFER:
            continue
        found = LAYER.match(name)
        if found is None:
            outside[name] = shape
        else:
            layers.setdefault(found[1], {}).setdefault(int(found[2]), []).append(shape)
    tables = {name: shape for name, shape in outside.items() if len(shape) == 2}
    if not layers or not tables:
        raise ValueError("the tensors have no layers or no embedding")
    # the decoder, or the only stack, is last
    names = sorted(layers, key=lambda name: ("decoder" in name, name))
    mlp_size = max(
        max(shape) for name in names for shape in layers[name][min(layers[name])] if len(shape) == 2
    )
    halves = (config, config.get("decoder") or {})
    sizes = {shape[0] for shape in tables.values()}
    named = sizes & {half.get("vocab_size") for half in halves}
    vocabulary = max(named or sizes)
    heads = [shape for name, shape in tables.items() if HEAD.search(name)]
    embeddings = [
        shape for name, shape in tables.items() if shape[0] == vocabulary and not HEAD.search(name)
    ]
    # A file may hold a second copy of a tied matrix.
    is_tied = not heads or (bool(embeddings) and config.get("tie_word_embeddings") is True)
    head = heads[0] if heads else embeddings[-1]
    total = sum(math.prod(shape) for shape in outside.values())
    if heads and is_tied:
        total -= math.prod(head)
    return ModelSizes(
        stacks=tuple(_stack(layers[name], mlp_size) for name in names),
        table_parameters=total - math.prod(head),
        head_parameters=math.prod(head),
        is_tied=is_tied,
        hidden_size=head[1],
        mlp_size=mlp_size,
        num_heads=next((int(c[name]) for c in halves for name in HEADS if c.get(name)), 1),
        encoder_parameters=sum(
            math.prod(shape)
            for name, shape in outside.items()
            if len(layers) > 1 and "encoder." in name and "decoder" not in name
        ),
        kinds=layer_kinds(config),
    )


def layer_kinds(config: Json) -> tuple[LayerKind, ...]:
    """Returns the kinds of layers of a model, from its config.json: one, or one per stack."""
    halves = [half for name in ("encoder", "decoder") if (half := config.get(name))]
    return tuple(layer_kind(half) for half in halves or (config,))


def layer_kind(config: Json) -> LayerKind:
    """Returns the kind of layer of a stack, from its configuration."""
    name = config.get("model_type", "llama")
    if name == "t5":
        how = str(config.get("feed_forward_proj", "relu"))
        activation = how.removeprefix("gated-")
        return LayerKind(
            activation="gelu_new" if how == "gated-gelu" else activation,
            is_gated=how != activation,
            has_position_bias=True,
        )
    chosen = config.get("hidden_act") or config.get("activation_function")
    return LayerKind(
        activation=str(chosen or DEFAULT_ACTIVATIONS.get(name, "silu")),
        has_rms_norm=name not in LAYER_NORMED,
        is_gated=name not in LAYER_NORMED,
        is_joined=name in JOINED,
        has_position_bias=name == "bloom",
    )


def _stack(layers: Mapping[int, list[tuple[int, ...]]], mlp_size: int) -> LayerStack:
    shapes = [shape for layer in layers.values() for shape in layer]
    mlp = sum(math.prod(shape) for shape in shapes if mlp_size in shape)
    width = sum(sum(shape) for shape in shapes if len(shape) == 2)
    count = len(layers)
    total = sum(math.prod(shape) for shape in shapes)
    return LayerStack(count, (total - mlp) // count, mlp // count, width // count)


def guess_model(facts: ModelFacts, reason: str) -> ModelSizes:
    """Returns approximate sizes of a model from its facts. `reason` says why its files are not used."""
    hidden, head = facts.hidden_size, facts.hidden_size * facts.vocab_size
    layers = max(1, facts.num_parameters - head)
    counts = [n for n in (facts.num_encoder_layers, facts.num_layers) if n]
    each = layers // max(1, sum(counts))
    stacks = tuple(LayerStack(n, each // 3, each - each // 3, 20 * hidden) for n in counts)
    num_heads = max(1, hidden // 64)
    return ModelSizes(stacks, 0, head, True, hidden, 4 * hidden, num_heads, guess_reason=reason)


def student_sizes(student: Student, start: ModelSizes, size: int | None = None) -> ModelSizes:
    """Returns the sizes of the student that a job makes. `size` is one number of a ladder."""
    if student.config is not None:
        return fresh_sizes(student.config, start)
    number = size if size is not None else student.num_decoder_layers
    if number is None and isinstance(student.num_layers, int):
        number = student.num_layers
    if number is None and student.layers is not None:
        number = len(student.layers)
    if number is None and student.init == "layers":
        number = max(1, start.stacks[-1].num_layers // 2)
    sizes = start.with_layers(number, student.num_encoder_layers)
    return _narrowed(sizes, student) if student.init == "width" else sizes


def _narrowed(start: ModelSizes, student: Student) -> ModelSizes:
    hidden = student.hidden_size or start.hidden_size
    mlp_size = student.intermediate_size or start.mlp_size
    num_heads = student.num_heads or start.num_heads
    width = hidden / start.hidden_size
    heads, mlp = num_heads / start.num_heads, mlp_size / start.mlp_size
    stacks = tuple(
        replace(
            stack,
            attention_parameters=round(stack.attention_parameters * width * heads),
            mlp_parameters=round(stack.mlp_parameters * width * mlp),
            linear_width=round(stack.linear_width * (width + (heads + mlp) / 2) / 2),
        )
        for stack in start.stacks
    )
    return replace(
        start,
        stacks=stacks,
        table_parameters=round(start.table_parameters * width),
        head_parameters=start.vocab_size * hidden,
        hidden_size=hidden,
        mlp_size=mlp_size,
        num_heads=num_heads,
    )


def fresh_sizes(config: FreshConfig, tokenizer_owner: ModelSizes) -> ModelSizes:
    """Returns the sizes of a fresh student, which has the vocabulary of another model."""
    H = config.hidden_size
    is_gated = config.family in ("llama", "t5")
    F = config.intermediate_size or (max(16, 8 * H // 3 // 16 * 16) if is_gated else 4 * H)
    vocabulary = config.vocab_size or tokenizer_owner.vocab_size
    num_matrices = 3 if is_gated else 2

    def stack(num_layers: int, num_attentions: int) -> LayerStack:
        """Returns a stack whose layers have this number of attentions."""
        width = 8 * H * num_attentions + num_matrices * (H + F)
        return LayerStack(num_layers, 4 * H * H * num_attentions, num_matrices * H * F, width)

    num_decoder = config.num_decoder_layers or config.num_layers
    stacks = [stack(num_decoder, 2 if config.has_encoder else 1)]
    tables = config.max_positions * H if config.family in ("gpt2", "encoder-decoder") else H
    if config.has_encoder:
        stacks.insert(0, stack(config.num_encoder_layers or config.num_layers, 1))
    if config.family == "encoder-decoder":  # the encoder has an embedding of its own
        tables += vocabulary * H + config.max_positions * H
    kind = layer_kind(
        {"model_type": "gpt2" if config.family == "encoder-decoder" else config.family}
    )
    return ModelSizes(
        tuple(stacks),
        tables,
        vocabulary * H,
        True,
        H,
        F,
        num_heads=config.num_heads,
        kinds=(replace(kind, is_gated=is_gated),),
    )


def num_trained(student: Student, sizes: ModelSizes) -> int:
    """Returns the number of parameters of a student that the optimizer changes."""
    if student.init == "lora":
        rank = (student.lora or Lora()).rank
        return rank * sum(stack.num_layers * stack.linear_width for stack in sizes.stacks)
    number = sizes.num_parameters
    if student.freeze_head:
        number -= sizes.head_parameters
    if student.freeze_encoder and len(sizes.stacks) > 1:
        number -= sizes.stacks[0].num_parameters + sizes.encoder_parameters
    return number
