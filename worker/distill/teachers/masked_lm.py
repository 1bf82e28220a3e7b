"""BERT and RoBERTa as teachers of generation: conditional masked language modelling.

Such a model has no next-token distribution. It does have a distribution for a masked target, given
the source and both sides of the target. This is the soft label for the student's decoder at that
position.

Source: Chen et al., arXiv:1911.03829.

K passes, L tokens of source and target, T targets of one example, H hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from worker.distill.data.rows import Example
from worker.distill.forward.hidden_states import transform_of
from worker.host_copies import to_device

NUM_PASSES = 4  # each pass masks a quarter of the targets and shows the others


class MaskedTeacher:
    """Teacher that gives the LM head's inputs at masked targets.

    Each example is computed alone, as K copies of equal length, so its bits depend on that example
    alone.
    """

    def __init__(
        self, model: PreTrainedModel, mask_id: int, *, num_passes: int = NUM_PASSES
    ) -> None:
        self._model = model.eval()
        self._mask_id = mask_id
        self._num_passes = num_passes

    @torch.no_grad()
    def hidden(self, examples: Sequence[Example]) -> list[Tensor]:
        return [self._hidden(example) for example in examples]

    def _hidden(self, example: Example) -> Tensor:
        targets_T = torch.tensor(example.target_positions)
        passes_T = torch.arange(len(targets_T)) % self._num_passes
        ids_KL = torch.tensor(example.token_ids).repeat(self._num_passes, 1)
        ids_KL[passes_T, targets_T] = self._mask_id
        ids_KL, passes_T, targets_T = (
            to_device(tensor, self._model.device) for tensor in (ids_KL, passes_T, targets_T)
        )
        states_KLH: Tensor = self._model.base_model(
            input_ids=ids_KL,
            attention_mask=torch.ones_like(ids_KL),
            **segments(self._model, [example], ids_KL.shape[1]),
        ).last_hidden_state
        return transform_of(self._model)(states_KLH[passes_T, targets_T])


def segments(
    model: PreTrainedModel, examples: Sequence[Example], num_tokens: int
) -> dict[str, Tensor]:
    """Returns the `token_type_ids` of BERT, whose second segment begins at a row's first target.

    Returns {} for models with one segment, such as RoBERTa.
    """
    if model.config.type_vocab_size < 2:
        return {}
    firsts_B = torch.tensor([example.target_positions[0] for example in examples])
    types_BL = torch.arange(num_tokens) >= firsts_B[:, None]
    return {"token_type_ids": to_device(types_BL.long(), model.device)}
