"""Students made narrower than their start: the least used channels, heads and neurons are left out.

Importance is the mean absolute activation on a few sequences, as in Minitron (arXiv:2407.14679): of a hidden channel the
outputs of all norms, of a neuron what the layer's last matrix reads of it, of a head the norm of its output. Without
sequences the norms of the weights that read a part decide.

A norm divides by the root mean square (GPT-2: the standard deviation) of the channels that are left, which is another
number than before; its weight is multiplied by the mean ratio of the two, measured on the same sequences. That is exact
where the lost channels were zero. The shift of a LayerNorm's mean is not made good.

H hidden channels, N heads, K heads of keys and values, I neurons, D width of a head.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from app.contracts.distillation import Student
from worker.distill.students.layer_dropping import rebuild
from worker.errors import InvalidStudent, UnsupportedModel
from worker.models.architectures import shape_of

# Tensors by what their axes count: H, I as above; Q heads x D, K heads of keys and values x D, 3 queries, keys and
# values behind each other, N heads, "." something that stays whole.
LLAMA_AXES = {
    ".": "q_norm.weight k_norm.weight",
    ".H": "embed_tokens.weight lm_head.weight",
    "H": "input_layernorm.weight post_attention_layernorm.weight norm.weight o_proj.bias down_proj.bias",
    "QH": "q_proj.weight",
    "Q": "q_proj.bias",
    "KH": "k_proj.weight v_proj.weight",
    "K": "k_proj.bias v_proj.bias",
    "HQ": "o_proj.weight",
    "IH": "gate_proj.weight up_proj.weight",
    "I": "gate_proj.bias up_proj.bias",
    "HI": "down_proj.weight",
}
GPT2_AXES = {
    ".H": "wte.weight wpe.weight lm_head.weight",
    "H": "ln_1.weight ln_1.bias ln_2.weight ln_2.bias ln_f.weight ln_f.bias attn.c_proj.bias mlp.c_proj.bias",
    "H3": "c_attn.weight",
    "3": "c_attn.bias",
    "QH": "attn.c_proj.weight",
    "HI": "c_fc.weight",
    "I": "c_fc.bias",
    "IH": "mlp.c_proj.weight",
}
T5_AXES = {
    ".H": "shared.weight embed_tokens.weight lm_head.weight",
    "H": "layer_norm.weight final_layer_norm.weight",
    "QH": "q.weight k.weight v.weight",
    "HQ": "o.weight",
    ".N": "relative_attention_bias.weight",
    "IH": "wi.weight wi_0.weight wi_1.weight",
    "HI": "wo.weight",
}
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
AXES = {**dict.fromkeys(LLAMA_LIKE, LLAMA_AXES), "gpt2": GPT2_AXES, "t5": T5_AXES}
Sequences = Sequence[Sequence[int]]


Note = Callable[[str, str, Tensor], None]  # letter, name and what the module sees


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that a student may have less of."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int


@dataclass
class Parts:
    """One tensor a kind of part: how important each is, or which are kept, by the module they belong to."""

    hidden_H: Tensor
    heads: dict[str, Tensor] = field(default_factory=dict)
    kv_heads: dict[str, Tensor] = field(default_factory=dict)
    neurons: dict[str, Tensor] = field(default_factory=dict)


def sizes_of(student: Student, config: PretrainedConfig) -> Sizes:
    """The student's sizes, those it does not name being its start's. Raises UnsupportedModel, InvalidStudent."""
    if config.model_type not in AXES:
        raise UnsupportedModel(
            f"student.init=width does not know the parts of a {config.model_type} model, only of "
            f"{', '.join(sorted(AXES))}; use init=layers"
        )
    full = full_sizes(config)
    hidden_size, num_heads = student.hidden_size, student.num_heads
    if config.model_type == "gpt2":  # its heads share the hidden size out among themselves
        width = head_width(config)
        num_heads = num_heads or max(1, (hidden_size or full.hidden_size) // width)
        hidden_size = hidden_size or num_heads * width
        if hidden_size != num_heads * width:
            raise InvalidStudent(
                f"the heads of this gpt2 are {width} wide, so student.hidden_size must be num_heads x {width}; "
                f"ask for {num_heads * width}"
            )
    num_heads = num_heads or full.num_heads
    return Sizes(
        hidden_size=hidden_size or full.hidden_size,
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(num_heads, full),
        intermediate_size=student.intermediate_size or full.intermediate_size,
    )


def full_sizes(config: PretrainedConfig) -> Sizes:
    num_heads = int(config.num_attention_heads)
    intermediate = {"gpt2": "n_inner", "t5": "d_ff"}.get(config.model_type, "intermediate_size")
    return Sizes(
        hidden_size=int(config.hidden_size),
        num_heads=num_heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or num_heads),
        intermediate_size=int(getattr(config, intermediate) or 4 * config.hidden_size),
    )


def head_width(config: PretrainedConfig) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def narrow_config(config: PretrainedConfig, sizes: Sizes) -> PretrainedConfig:
    """The configuration of a model of these sizes, its heads as wide as they were. Raises InvalidStudent."""
    full = full_sizes(config)
    for name, size in vars(sizes).items():
        if size > (most := getattr(full, name)):
            raise InvalidStudent(
                f"student.{name} is {size}, but the model it starts from has {most}; ask for less"
            )
    values: dict[str, Any] = config.to_dict()  # Any: open-ended JSON
    if config.model_type == "gpt2":
        values |= {
            "n_embd": sizes.hidden_size,
            "n_head": sizes.num_heads,
            "n_inner": sizes.intermediate_size,
        }
    elif config.model_type == "t5":
        values |= {
            "d_model": sizes.hidden_size,
            "num_heads": sizes.num_heads,
            "d_ff": sizes.intermediate_size,
        }
    else:
        values |= {
            "hidden_size": sizes.hidden_size,
            "num_attention_heads": sizes.num_heads,
            "num_key_value_heads": sizes.num_kv_heads,
            "intermediate_size": sizes.intermediate_size,
            "head_dim": head_width(config),
        }
    try:
        return type(config).from_dict(values)
    except StrictDataclassError as error:
        raise InvalidStudent(
            f"no {config.model_type} model has the student's sizes: {error}"
        ) from error


@torch.no_grad()
def slice_width(
    model: PreTrainedModel, sizes: Sizes, calibration: Sequences = ()
) -> PreTrainedModel:
    """A model of these sizes that holds the most important parts of the given one.

    Each calibration sequence is a model's input (of an encoder-decoder, of both its sides). Heads of queries stay with
    their heads of keys and values. Heads of T5's self-attention go on all layers of a side alike: they share a bias.
    """
    config = narrow_config(model.config, sizes)
    sequences = [sequence for sequence in calibration if sequence]
    importance = _activations(model, sequences) if sequences else _weight_norms(model)
    kept = _choose(importance, full_sizes(model.config), sizes)
    scales = _norm_scales(model, sequences, kept.hidden_H)
    weights = {}
    for name, tensor in model.state_dict().items():
        cut = tensor
        for axis, letter in enumerate(_axes(model.config, name)):
            if letter != ".":
                cut = cut.index_select(axis, _indices(letter, name, kept, model.config))
        if name.endswith(".weight"):
            cut = cut * scales.get(name.removesuffix(".weight"), 1.0)
        weights[name] = cut
    return rebuild(model, config, weights)


def _num_kv_heads(num_heads: int, full: Sizes) -> int:
    """Whole groups go where that gives the number; else every group loses as many heads of queries."""
    group = full.num_heads // full.num_kv_heads
    if num_heads % group == 0:
        return num_heads // group
    if num_heads % full.num_kv_heads == 0:
        return full.num_kv_heads
    raise InvalidStudent(
        f"{num_heads} heads do not share {full.num_kv_heads} heads of keys and values; ask for a multiple of {group} or "
        f"of {full.num_kv_heads} in student.num_heads"
    )


def _axes(config: PretrainedConfig, name: str) -> str:
    for axes, ends in AXES[config.model_type].items():
        if any(f".{name}".endswith(f".{end}") for end in ends.split()):
            return axes
    raise UnsupportedModel(f"student.init=width does not know the tensor {name}; use init=layers")


def _owner(name: str) -> str:
    """The module whose heads or neurons a part belongs to; for all self-attention of one side of a T5, the side."""
    owner = name.rpartition(".")[0]
    return f"{owner.split('.')[0]}.self" if owner.endswith("SelfAttention") else owner


def _readers(model: PreTrainedModel) -> list[tuple[str, str, Any]]:
    """Norms (as "norm") and linear layers inside the layers, by what they read; Any: transformers is untyped."""
    found: list[tuple[str, str, Any]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            axes = _axes(model.config, f"{name}.weight")
            found.append((name, axes[0] if isinstance(module, Conv1D) else axes[1], module))
        elif (
            not list(module.children())
            and not isinstance(module, nn.Embedding)
            and hasattr(module, "weight")
        ):
            is_norm = _axes(model.config, f"{name}.weight") == "H"
            found += [(name, "norm", module)] if is_norm else []
    return found


def _add(parts: Parts, letter: str, name: str, values: Tensor) -> None:
    if letter in ("H", "norm"):
        parts.hidden_H += values
    else:
        owners = parts.neurons if letter == "I" else parts.heads
        owners[_owner(name)] = owners.get(_owner(name), torch.zeros_like(values)) + values


def _weight_norms(model: PreTrainedModel) -> Parts:
    parts = Parts(torch.zeros(int(model.config.hidden_size)))
    head = model.get_output_embeddings()
    for name, letter, module in _readers(model):
        if letter == "norm" or module is head:
            continue
        norms = module.weight.norm(dim=1 if isinstance(module, Conv1D) else 0)
        if letter == "Q":
            norms = norms.view(-1, head_width(model.config)).norm(dim=1)
        _add(
            parts, letter, name, norms / norms.mean()
        )  # a wide matrix counts no more than a narrow one
    return parts


def _activations(model: PreTrainedModel, sequences: Sequences) -> Parts:
    parts = Parts(torch.zeros(int(model.config.hidden_size)))
    width = head_width(model.config)

    def note(letter: str, name: str, seen: Tensor) -> None:
        rows = seen.flatten(0, -2)
        sizes = rows.view(len(rows), -1, width).norm(dim=2) if letter == "Q" else rows.abs()
        _add(parts, letter, name, sizes.mean(dim=0))

    hooks = []
    for name, letter, module in _readers(model):
        if letter == "norm":
            after = partial(_note_output, note, name)
            hooks.append(module.register_forward_hook(after))
        elif letter in "QI":
            hook = partial(_note_input, note, letter, name)
            hooks.append(module.register_forward_pre_hook(hook))
    _run(model, sequences, hooks)
    return parts


def _note_input(note: Note, letter: str, name: str, _: nn.Module, inputs: tuple[Tensor]) -> None:
    note(letter, name, inputs[0])


def _note_output(note: Note, name: str, _: nn.Module, __: Any, output: Tensor) -> None:
    note("norm", name, output)


def _norm_scales(
    model: PreTrainedModel, sequences: Sequences, kept_H: Tensor
) -> Mapping[str, float]:
    """What each norm's weight is multiplied by, so that what it gives to the kept channels stays as large."""
    num_hidden = int(model.config.hidden_size)
    ratios: dict[str, list[Tensor]] = {}
    if len(kept_H) == num_hidden:
        return {}
    is_layer_norm = model.config.model_type == "gpt2"

    def spread(x: Tensor) -> Tensor:
        return (
            (x - x.mean(dim=-1, keepdim=True) if is_layer_norm else x).square().mean(dim=-1).sqrt()
        )

    hooks = []
    for name, letter, module in _readers(model):
        if letter == "norm":
            seen = ratios.setdefault(name, [])
            hook: Callable[..., None] = lambda m, x, seen=seen: seen.append(  # noqa: E731
                (spread(x[0][..., kept_H]) / spread(x[0]).clamp_min(1e-12)).mean()
            )
            hooks.append(module.register_forward_pre_hook(hook))
    _run(model, sequences, hooks)
    scales = {
        name: float(torch.stack(seen).mean()) if seen else 1.0 for name, seen in ratios.items()
    }
    if model.config.model_type == "t5" and model.config.scale_decoder_outputs:
        # the head's input is divided by the root of the hidden size, which is smaller now
        scales["decoder.final_layer_norm"] *= (len(kept_H) / num_hidden) ** 0.5
    return scales


def _run(
    model: PreTrainedModel, sequences: Sequences, hooks: list[Any]
) -> None:  # Any: torch's handles
    try:
        for sequence in sequences:
            ids_BT = torch.tensor([list(sequence)])
            inputs = {"input_ids": ids_BT}
            if shape_of(model.config) == "seq2seq":
                inputs["decoder_input_ids"] = ids_BT
            model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


def _choose(importance: Parts, full: Sizes, sizes: Sizes) -> Parts:
    kept = Parts(_largest(importance.hidden_H, sizes.hidden_size))
    for owner, values_I in importance.neurons.items():
        kept.neurons[owner] = _largest(values_I, sizes.intermediate_size)
    for owner, values_N in importance.heads.items():
        groups = values_N.view(full.num_kv_heads, -1)
        kv_heads = _largest(groups.sum(dim=1), sizes.num_kv_heads)
        num_each, group = sizes.num_heads // sizes.num_kv_heads, groups.shape[1]
        heads = [int(k) * group + _largest(groups[k], num_each) for k in kv_heads]
        kept.heads[owner], kept.kv_heads[owner] = torch.cat(heads), kv_heads
    return kept


def _largest(values: Tensor, number: int) -> Tensor:
    """Their places, rising; of equals the earlier."""
    return values.argsort(descending=True, stable=True)[:number].sort().values


def _indices(letter: str, name: str, kept: Parts, config: PretrainedConfig) -> Tensor:
    if letter == "H":
        return kept.hidden_H
    owner = _owner(name.rpartition(".")[0])
    if letter == "I":
        return kept.neurons[owner]
    heads = kept.kv_heads[owner] if letter == "K" else kept.heads[owner]
    if letter == "N":
        return heads
    width = head_width(config)
    features = (heads[:, None] * width + torch.arange(width)).flatten()
    if letter == "3":
        return torch.cat([features + part * int(config.hidden_size) for part in range(3)])
    return features
