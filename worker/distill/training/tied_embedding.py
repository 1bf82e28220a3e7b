"""Sparse gradient for an input embedding that shares its matrix with the LM head.

PyTorch would fill a dense gradient for the embedding with zeros, add a few rows, and add all of it
to the head's gradient. These are several passes over the largest parameter, for the tokens of one
batch.

N tokens, H hidden width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel


@contextmanager
def sparse_embedding_grad(model: PreTrainedModel, head_VH: Tensor) -> Iterator[None]:
    """Accumulates the embedding's gradient sparsely while the block runs forward and backward.

    At the end of the block, the rows of the batch's tokens are added to the gradient that the LM
    head has left.
    """
    embedding = model.get_input_embeddings()
    if not _is_tied(embedding, head_VH):
        yield
        return
    waiting: list[tuple[Tensor, Tensor]] = []
    embedding.forward = lambda ids: _Lookup.apply(ids, embedding.weight, waiting)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        del embedding.forward
    for ids, grad in waiting:
        ids_N, grad_NH = ids.reshape(-1), grad.reshape(-1, grad.shape[-1])
        if embedding.padding_idx is not None:
            grad_NH = grad_NH * (ids_N != embedding.padding_idx)[:, None]
        if head_VH.grad is None:
            head_VH.grad = torch.zeros_like(head_VH)
        head_VH.grad.index_add_(0, ids_N, grad_NH)


def _is_tied(embedding: nn.Module, head_VH: Tensor) -> bool:
    is_plain = type(embedding) is nn.Embedding and not (
        embedding.max_norm or embedding.scale_grad_by_freq
    )
    is_trained = head_VH.requires_grad and head_VH.device.type == "cpu"
    return is_plain and is_trained and embedding.weight is head_VH


class _Lookup(torch.autograd.Function):
    """Embedding lookup that stores its output's gradient in `waiting`."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight_VH: Tensor, waiting: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        # ctx is Any: PyTorch does not type the attributes of a context
        """Looks up the embeddings of `ids`."""
        ctx.ids, ctx.waiting = ids, waiting
        return nn.functional.embedding(ids, weight_VH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        """Stores the gradient. Nothing flows into the weight."""
        ctx.waiting.append((ctx.ids, grad))
        return None, None, None
