"""Builds students that are narrower than their start, by removing unimportant parts.

The parts are hidden channels, attention heads and neurons. Their importance is the mean absolute
activation on a few sequences, as in Minitron (arXiv:2407.14679). For channels these are the outputs
of all norms, and for neurons the inputs of the MLP's last matrix. For heads it is the mean norm of
their outputs. Without sequences, the importance is the norm of the weights that read the part, each
matrix normalised to a mean of 1, without the LM head.

A norm layer divides by the root mean square of its channels (GPT-2: by their standard deviation).
This value changes when channels are removed. The norm's weight is therefore multiplied by the mean
ratio of the new value to the old one, on the same sequences. For an RMS norm this is exact if the
removed channels were zero. The change of a LayerNorm's mean is not compensated.

H hidden channels, N query heads, I neurons, D head width. The table below says what Q and K are.
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

from app.contracts.architectures import ARCHITECTURES
from app.contracts.distillation import Student
from worker.distill.students.float32_parts import float32_parts
from worker.distill.students.layer_dropping import rebuild
from worker.errors import InvalidStudent, UnsupportedModel
from worker.models.architectures import kind_of

# Tensor names by what their axes count. H, I and N are as above. Q is query heads x D, and K is
# key-value heads x D. 3 is queries, keys and values (each heads x D) one after another. "." is an
# axis that is not pruned.
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
AXES_OF_LAYERS = {"gpt2": GPT2_AXES, "llama": LLAMA_AXES, "t5": T5_AXES}
AXES = {a.model_type: AXES_OF_LAYERS[a.layers] for a in ARCHITECTURES.values() if a.layers}
Sequences = Sequence[Sequence[int]]
Note = Callable[[str, str, Tensor], None]  # axis letter, module name, observed activations


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model that width pruning can reduce."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int


@dataclass
class Parts:
    """Importance of all parts, or indices of kept ones. Heads and neurons are by owner module."""

    hidden_H: Tensor
    heads: dict[str, Tensor] = field(default_factory=dict)
    kv_heads: dict[str, Tensor] = field(default_factory=dict)
    neurons: dict[str, Tensor] = field(default_factory=dict)


def sizes_of(student: Student, config: PretrainedConfig) -> Sizes:
    """Returns the student's sizes. Sizes that are not given are those of the start.

    Raises UnsupportedModel for other model families, and InvalidStudent if the sizes do not fit.
    """
    if config.model_type not in AXES:
        raise UnsupportedModel(
            f"student.init=width does not support {config.model_type} models, only "
            f"{', '.join(sorted(AXES))}; use init=layers"
        )
    full = full_sizes(config)
    hidden_size, num_heads = student.hidden_size, student.num_heads
    if config.model_type == "gpt2":  # its head width is always hidden_size / num_heads
        width = head_width(config)
        num_heads = num_heads or max(1, (hidden_size or full.hidden_size) // width)
        hidden_size = hidden_size or num_heads * width
        if hidden_size != num_heads * width:
            raise InvalidStudent(
                f"the head size of this gpt2 model is {width}, so student.hidden_size must be num_heads x {width}; "
                f"set it to {num_heads * width}"
            )
    num_heads = num_heads or full.num_heads
    return Sizes(
        hidden_size=hidden_size or full.hidden_size,
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(num_heads, full),
        intermediate_size=student.intermediate_size or full.intermediate_size,
    )


def full_sizes(config: PretrainedConfig) -> Sizes:
    """Returns the sizes of the model with this configuration."""
    num_heads = int(config.num_attention_heads)
    intermediate = {"gpt2": "n_inner", "t5": "d_ff"}.get(config.model_type, "intermediate_size")
    return Sizes(
        hidden_size=int(config.hidden_size),
        num_heads=num_heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or num_heads),
        intermediate_size=int(getattr(config, intermediate) or 4 * config.hidden_size),
    )


def head_width(config: PretrainedConfig) -> int:
    """Returns the number of features per attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def narrow_config(config: PretrainedConfig, sizes: Sizes) -> PretrainedConfig:
    """Returns the configuration of a model with these sizes. The head width stays the same.

    Raises InvalidStudent if a size exceeds the model's, or if the family does not allow the sizes.
    """
    full = full_sizes(config)
    for name, size in vars(sizes).items():
        if size > (most := getattr(full, name)):
            raise InvalidStudent(
                f"student.{name} is {size}, but the model it starts from has {most}; lower it"
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
            f"a {config.model_type} model cannot have the student's sizes: {error}"
        ) from error


@torch.no_grad()
def slice_width(
    model: PreTrainedModel, sizes: Sizes, calibration: Sequences = ()
) -> PreTrainedModel:
    """Returns a float32 model of these sizes with the most important parts of the given model.

    Each calibration sequence is an input of the model; in an encoder-decoder both sides read it.
    Query heads stay with their key-value heads. T5's self-attention layers of one side share a
    position bias, so the same heads are removed from all of them.
    """
    config = narrow_config(model.config, sizes)
    sequences = [sequence for sequence in calibration if sequence]
    importance = _activations(model, sequences) if sequences else _weight_norms(model)
    kept = _choose(importance, full_sizes(model.config), sizes)
    scales = _norm_scales(model, sequences, kept.hidden_H)

    def cut(name: str, tensor: Tensor) -> Tensor:
        """Returns the kept part of a tensor, scaled if it is the weight of a norm."""
        for axis, letter in enumerate(_axes(model.config, name)):
            if letter != ".":
                tensor = tensor.index_select(axis, _indices(letter, name, kept, model.config))
        scale = scales.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        return tensor if scale is None else tensor.float() * scale

    weights = ((name, cut(name, tensor)) for name, tensor in model.state_dict().items())
    return rebuild(model, config, weights)


def _num_kv_heads(num_heads: int, full: Sizes) -> int:
    """Returns the number of key-value heads for `num_heads` query heads.

    Whole groups of query heads are removed if that gives the number. Otherwise every group loses
    the same number of query heads. Raises InvalidStudent if neither is possible.
    """
    group = full.num_heads // full.num_kv_heads
    if num_heads % group == 0:
        return num_heads // group
    if num_heads % full.num_kv_heads == 0:
        return full.num_kv_heads
    raise InvalidStudent(
        f"{num_heads} heads cannot share {full.num_kv_heads} key-value heads; set student.num_heads to a multiple of "
        f"{group} or of {full.num_kv_heads}"
    )


def _axes(config: PretrainedConfig, name: str) -> str:
    for axes, ends in AXES[config.model_type].items():
        if any(f".{name}".endswith(f".{end}") for end in ends.split()):
            return axes
    raise UnsupportedModel(
        f"student.init=width does not support the tensor {name}; use init=layers"
    )


def _owner(name: str) -> str:
    """Returns the module that owns the heads or neurons of a submodule.

    All self-attention layers of one side of a T5 have the same owner.
    """
    owner = name.rpartition(".")[0]
    return f"{owner.split('.')[0]}.self" if owner.endswith("SelfAttention") else owner


def _readers(model: PreTrainedModel) -> list[tuple[str, str, Any]]:
    """Returns (name, letter of the input axis or "norm", module) of all norms and linear layers."""
    # Any: transformers is untyped
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
        norms = module.weight.float().norm(dim=1 if isinstance(module, Conv1D) else 0)
        if letter == "Q":
            norms = norms.view(-1, head_width(model.config)).norm(dim=1)
        # normalised, so that all matrices have the same influence
        _add(parts, letter, name, norms / norms.mean())
    return parts


def _activations(model: PreTrainedModel, sequences: Sequences) -> Parts:
    parts = Parts(torch.zeros(int(model.config.hidden_size)))
    width = head_width(model.config)

    def note(letter: str, name: str, seen: Tensor) -> None:
        """Adds the mean absolute activations, or norms per head, to the importance."""
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
    """Returns the factor for each norm's weight that keeps its outputs on `kept_H` as large."""
    num_hidden = int(model.config.hidden_size)
    ratios: dict[str, list[Tensor]] = {}
    if len(kept_H) == num_hidden:
        return {}
    is_layer_norm = model.config.model_type == "gpt2"

    def spread(x: Tensor) -> Tensor:
        """Returns the value by which the norm divides its input."""
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
        # T5 divides the head's input by the square root of the hidden size, which is smaller now
        scales["decoder.final_layer_norm"] *= (len(kept_H) / num_hidden) ** 0.5
    return scales


# Any: torch's handles
def _run(model: PreTrainedModel, sequences: Sequences, hooks: list[Any]) -> None:
    """Runs the model on the sequences, then removes the hooks."""
    try:
        with float32_parts(model):
            for sequence in sequences:
                ids_BT = torch.tensor([list(sequence)])
                inputs = {"input_ids": ids_BT}
                if kind_of(model.config) == "seq2seq":
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
    """Returns the indices of the largest values in rising order. Ties go to the lower index."""
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
