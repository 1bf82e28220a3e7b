"""Builds students that keep some layers of a model, and everything that is not a layer."""

import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from worker.errors import StudentTooDeep, UnsupportedModel
from worker.models.architectures import kind_of

PER_LAYER = ("layer_types", "no_rope_layers")  # configuration lists with one entry per layer
T5_BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"


def first_and_last(num_available: int, num_kept: int) -> tuple[int, ...]:
    """Returns the indices of the first and the last layers, half of `num_kept` each.

    If `num_kept` is odd, one more of the first layers is kept.
    Raises StudentTooDeep if `num_kept` is greater than `num_available`.
    """
    if num_kept > num_available:
        raise StudentTooDeep(
            f"the student asks for {num_kept} layers, but the model it starts from has {num_available}; ask for fewer"
        )
    num_first = -(-num_kept // 2)
    return (*range(num_first), *range(num_available - (num_kept - num_first), num_available))


def keep_layers(
    teacher: PreTrainedModel,
    layers: Sequence[int],
    encoder_layers: Sequence[int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Returns a copy of the model with only the given layers, in `dtype`.

    For an encoder-decoder, `layers` are the decoder's. Without `encoder_layers` the encoder keeps
    all its layers. T5 stores the relative position bias in the first layer of each side; it is
    moved to the first kept layer.
    """
    kept = [layers] if kind_of(teacher.config) != "seq2seq" else [encoder_layers, layers]
    stacks = layer_stacks(teacher)
    weights = teacher.state_dict()
    for prefix, numbers in zip(stacks, kept, strict=True):
        if numbers is not None:
            weights = _renumber(weights, prefix, numbers)
    config = cut_config(teacher.config, layers, encoder_layers)
    return rebuild(teacher, config, weights.items(), dtype=dtype)


@torch.no_grad()
def rebuild(
    teacher: PreTrainedModel,
    config: PretrainedConfig,
    weights: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Returns a model of the teacher's class with this configuration and these weights.

    The class is the teacher's own because there is no auto class for EncoderDecoderModel. Weights
    are taken and converted one at a time.
    """
    with no_init_weights():  # all weights are replaced
        student: PreTrainedModel = type(teacher)(config).float()
    student.tie_weights()
    _untie_head_like(teacher, student)
    if dtype != torch.float32:
        for parameter in student.parameters():  # buffers stay in float32
            parameter.data = torch.empty_like(parameter, dtype=dtype)
    own = student.state_dict()
    for name, weight in weights:
        target = own.pop(name)
        assert target.shape == weight.shape, f"{name} has another shape in the student"
        target.copy_(weight)
    assert not own, f"the student needs more weights: {sorted(own)[:3]}"
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def layer_stacks(model: PreTrainedModel) -> list[str]:
    """Returns the names of the layer lists: the encoder's and the decoder's, or the only one.

    Raises UnsupportedModel if the model has another number of such lists.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = [name for name in lists if not re.search(r"\.\d+(\.|$)", name)]
    if len(found) != (2 if kind_of(model.config) == "seq2seq" else 1):
        raise UnsupportedModel(f"cannot find the layers of a {model.config.model_type} model")
    return found


def cut_config(
    config: PretrainedConfig, layers: Sequence[int], encoder_layers: Sequence[int] | None
) -> PretrainedConfig:
    """Returns the configuration of a model that has only these layers."""
    if config.model_type == "encoder-decoder":
        both = copy.deepcopy(config)
        both.decoder = cut_config(config.decoder, layers, None)
        if encoder_layers is not None:
            both.encoder = cut_config(config.encoder, encoder_layers, None)
        return both
    values: dict[str, Any] = config.to_dict()  # Any: open-ended JSON
    for name in PER_LAYER:
        if isinstance(values.get(name), list):
            values[name] = [values[name][i] for i in layers]
    if kind_of(config) == "seq2seq":
        decoder_field, encoder_field = (
            ("num_decoder_layers", "num_layers")
            if config.model_type == "t5"
            else ("decoder_layers", "encoder_layers")
        )
        values[decoder_field] = len(layers)
        if encoder_layers is not None:
            values[encoder_field] = len(encoder_layers)
    else:
        values[type(config).attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(
            layers
        )
    return type(config).from_dict(values)


def _renumber(weights: dict[str, Tensor], prefix: str, layers: Sequence[int]) -> dict[str, Tensor]:
    inside = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    new_number = {old: new for new, old in enumerate(layers)}
    kept = {}
    for name, tensor in weights.items():
        found = inside.match(name)
        if found is None:
            kept[name] = tensor
        elif name[found.end() :] == T5_BIAS:
            kept[f"{prefix}.0.{T5_BIAS}"] = tensor
        elif (old := int(found[1])) in new_number:
            kept[f"{prefix}.{new_number[old]}.{name[found.end() :]}"] = tensor
    return kept


def _untie_head_like(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Gives a T5 student a separate head if the teacher's head is not tied to the embedding.

    T5 1.1 models have such a head, but T5Config describes every model as tied. Loading the weights
    into a tied student would overwrite its embedding with the head.
    """
    if teacher.config.model_type == "t5" and not is_tied(teacher):
        head: Any = student.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())


def is_tied(model: PreTrainedModel) -> bool:
    """Returns whether the head shares its weight with the (decoder's) input embedding."""
    writer: Any = model.decoder if model.config.model_type == "encoder-decoder" else model
    return bool(writer.get_output_embeddings().weight is writer.get_input_embeddings().weight)
