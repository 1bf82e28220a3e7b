"""Masks on a GPU, for which the device "meta" stands: it has no values that could be read."""

from typing import Any

import torch

from worker.models.attention_masks import packed_on_cpu, unread_sdpa_mask

SIZES: dict[str, Any] = {"batch_size": 2, "q_length": 3, "kv_length": 3}


def test_a_mask_without_padding_is_left_out_on_a_cpu_only() -> None:
    mask_BT = torch.ones(2, 3, dtype=torch.bool)
    assert unread_sdpa_mask(attention_mask=mask_BT, **SIZES) is None
    mask = unread_sdpa_mask(attention_mask=mask_BT.to("meta"), device="meta", **SIZES)
    assert mask is not None
    assert mask.shape == (2, 1, 3, 3)


def test_without_padding_and_without_a_mask_sdpa_needs_none() -> None:
    assert unread_sdpa_mask(device="meta", **SIZES) is None


def test_only_a_cpu_is_asked_for_packed_sequences() -> None:
    packed_1T = torch.tensor([[0, 1, 2, 0, 1]])
    assert packed_on_cpu(packed_1T) is not None
    assert packed_on_cpu(torch.arange(5)[None]) is None
    assert packed_on_cpu(packed_1T.to("meta")) is None
