"""What a model's head multiplies: its decoder's last states, for every kind of model.

B batch, T tokens, S source tokens, N rows (completion positions in the order of hidden_BTH[keep_BT]), H hidden width.
"""

from collections.abc import Callable

from torch import Tensor, nn
from transformers import PreTrainedModel

from worker.distill.batches import Batch
from worker.distill.shapes import shape_of


def hidden_rows(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The head's inputs where the model predicts targets, [N, H]."""
    rows_NH: Tensor = decoder_states(model, batch)[batch.keep_BT]
    return transform_of(model)(rows_NH)


def decoder_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The decoder's last states, [B, T, H]. Right padding follows every real token, so causal decoders need no mask."""
    if shape_of(model.config) == "seq2seq":
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
    """An encoder-decoder's source as its decoder sees it, [B, S, H]."""
    encoder = model.get_encoder()
    states_BSH: Tensor = encoder(
        input_ids=batch.source_ids_BS, attention_mask=batch.source_mask_BS
    ).last_hidden_state
    widen = getattr(model, "enc_to_dec_proj", None)  # of an encoder-decoder whose halves differ in width
    return states_BSH if widen is None else widen(states_BSH)


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The transformer that the head stands on: a causal model's body, or the second half of an encoder-decoder."""
    if model.config.model_type == "encoder-decoder":
        body: nn.Module = model.decoder.base_model
    elif shape_of(model.config) == "seq2seq":
        body = model.get_decoder()
    else:
        body = model.base_model
    return body


def transform_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """What stands between the last states and the head's matrix: BERT and RoBERTa have a layer there."""
    language_model = model.decoder if model.config.model_type == "encoder-decoder" else model
    if hasattr(language_model, "cls"):
        transform: Callable[[Tensor], Tensor] = language_model.cls.predictions.transform
        return transform
    if hasattr(getattr(language_model, "lm_head", None), "layer_norm"):  # RoBERTa's head is three layers
        head = language_model.lm_head
        return lambda states: head.layer_norm(nn.functional.gelu(head.dense(states)))
    return lambda states: states
