"""Attention masks of transformers on a GPU, without waits of the host.

In every forward pass, transformers reads the mask to see whether it can be left out. It also reads
the position ids, to see whether they number packed sequences. To read a tensor of a GPU, the host waits for all
work that is queued there. `never_read_masks` therefore replaces both functions: on a GPU, a mask
that is given is used, and position ids never stand for packed sequences. A caller that knows that
no token is masked gives no mask. On a CPU nothing changes.
"""

from typing import Any

from torch import Tensor
from transformers import AttentionMaskInterface, masking_utils

_find_packed = masking_utils.find_packed_sequence_indices


def unread_sdpa_mask(
    *, attention_mask: Tensor | None = None, **options: Any
) -> Tensor | None:  # Any: options of transformers, which is untyped here
    """Returns the same as `sdpa_mask`, without reading `attention_mask` if it is on a GPU."""
    if attention_mask is not None and attention_mask.device.type != "cpu":
        options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor | None = masking_utils.sdpa_mask(attention_mask=attention_mask, **options)
    return mask


def packed_on_cpu(position_ids: Tensor) -> Tensor | None:
    """Returns the number of the packed sequence of each position, or None if there is only one."""
    if position_ids.device.type != "cpu":
        return None
    packed: Tensor | None = _find_packed(position_ids)
    return packed


def never_read_masks() -> None:
    """Replaces the functions for all models of this process."""
    AttentionMaskInterface.register("sdpa", unread_sdpa_mask)
    masking_utils.find_packed_sequence_indices = packed_on_cpu
