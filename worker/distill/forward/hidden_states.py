"""Last hidden states of a model's decoder, which its LM head reads, for every kind of model.

B batch, T tokens, S source tokens, P packed tokens, H hidden size; N rows (target positions, row by
row).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from worker.distill.data.batching import Batch
from worker.distill.forward.packing import Packing, attending_packed, packing_of
from worker.models.architectures import kind_of

MOST_KEPT = 0.9  # share of a batch's positions above which selecting them saves nothing


@contextmanager
def autocast(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Runs the block under autocast in `dtype`, or without autocast if it is None."""
    with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype is not None):
        yield


def hidden_rows(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Returns the LM head's inputs where the model predicts targets, [N, H]."""
    return transform_of(model)(select(decoder_states(model, batch), batch.positions_N))


def select(states_BTH: Tensor, positions_N: Tensor) -> Tensor:
    """Returns the states [N, H] at these positions of the flattened batch [B * T]."""
    return states_BTH.flatten(0, 1).index_select(0, positions_N)


def hidden_rows_alone(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Returns the same as `hidden_rows`, faster, for callers that read no other hidden states.

    The last layer's MLP runs at the target positions only: no later module reads the others. Tokens
    that all rows begin with run once if that is possible (worker.distill.forward.packing).
    """
    packing = packing_of(model, batch)
    positions_N, num_positions = batch.positions_N, batch.input_ids_BT.numel()
    if packing is not None:
        keep_1P = packing.packed(batch.keep_BT)
        positions_N, num_positions = keep_1P[0].nonzero()[:, 0], keep_1P.numel()
    mlp = last_mlp(decoder_of(model))
    runs_apart = mlp is not None and batch.num_targets <= MOST_KEPT * num_positions
    with _run_at(mlp, positions_N) if mlp is not None and runs_apart else nullcontext():
        return transform_of(model)(select(run_body(model, batch, packing), positions_N))


def run_body(model: PreTrainedModel, batch: Batch, packing: Packing | None) -> Tensor:
    """Returns the decoder's last states: [B, T, H], or [1, P, H] for a packed batch."""
    if packing is None:
        return decoder_states(model, batch)
    ids_1P, positions_1P = packing.packed(batch.input_ids_BT), packing.position_ids_1P
    with attending_packed(packing):
        output = decoder_of(model)(input_ids=ids_1P, position_ids=positions_1P, use_cache=False)
    states_1PH: Tensor = output.last_hidden_state
    return states_1PH


def last_mlp(decoder: nn.Module) -> nn.Module | None:
    """Returns the MLP of the last layer if it is one module from states to states.

    Returns None for families without such a module: OPT, BART and BERT.
    """
    for name in ("layers", "h", "block"):
        layers = getattr(decoder, name, None)
        if isinstance(layers, nn.ModuleList):
            parts = getattr(layers[-1], "layer", None)  # T5: the MLP is the last part of a layer
            return (
                parts[-1] if isinstance(parts, nn.ModuleList) else getattr(layers[-1], "mlp", None)
            )
    return None


@contextmanager
def _run_at(mlp: nn.Module, positions_N: Tensor) -> Iterator[None]:
    """Context manager in which the module runs at these positions only.

    Its input is the states there as rows, and its result is zero at the other positions.
    """
    shape: tuple[int, ...] = ()

    def take(module: nn.Module, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Selects the states as rows."""
        nonlocal shape
        shape = states[0].shape[:2]
        return tuple(select(state_BTH, positions_N) for state_BTH in states)

    def put(module: nn.Module, states: tuple[Tensor, ...], out_NH: Tensor) -> Tensor:
        """Puts the rows back to their positions, with zeros elsewhere."""
        out_MH = out_NH.new_zeros((math.prod(shape), out_NH.shape[-1]))
        return out_MH.index_copy_(0, positions_N, out_NH).view(*shape, -1)

    handles = (mlp.register_forward_pre_hook(take), mlp.register_forward_hook(put))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def decoder_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Returns the decoder's last states, [B, T, H].

    Padding is on the right, after every real token, so causal decoders need no mask.
    """
    if kind_of(model.config) == "seq2seq":
        encoder_BSH = encoder_states(model, batch)
        output = decoder_of(model)(
            input_ids=batch.input_ids_BT,
            encoder_hidden_states=encoder_BSH,
            encoder_attention_mask=batch.source_mask_BS,
            use_cache=False,
        )
    else:
        output = decoder_of(model)(input_ids=batch.input_ids_BT, use_cache=False)
    states_BTH: Tensor = output.last_hidden_state
    return states_BTH


def encoder_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Returns the encoder's last states as the decoder reads them, [B, S, H]."""
    encoder = model.get_encoder()
    states_BSH: Tensor = encoder(
        input_ids=batch.source_ids_BS, attention_mask=batch.source_mask_BS
    ).last_hidden_state
    # present if encoder and decoder differ in width
    widen = getattr(model, "enc_to_dec_proj", None)
    return states_BSH if widen is None else widen(states_BSH)


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Returns the module below the LM head.

    It is the body of a causal or masked model, or the decoder of an encoder-decoder.
    """
    if model.config.model_type == "encoder-decoder":
        body: nn.Module = model.decoder.base_model
    elif kind_of(model.config) == "seq2seq":
        body = model.get_decoder()
    else:
        body = model.base_model
    return body


def transform_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Returns the function between the last states and the matrix of the LM head.

    BERT and RoBERTa have layers there. For all other models it is the identity.
    """
    language_model = model.decoder if model.config.model_type == "encoder-decoder" else model
    if hasattr(language_model, "cls"):
        transform: Callable[[Tensor], Tensor] = language_model.cls.predictions.transform
        return transform
    # RoBERTa's head has three layers
    if hasattr(getattr(language_model, "lm_head", None), "layer_norm"):
        head = language_model.lm_head
        return lambda states: head.layer_norm(nn.functional.gelu(head.dense(states)))
    return lambda states: states
