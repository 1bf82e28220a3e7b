"""The gradient of an embedding whose matrix is the head's, too, without a matrix of its own.

torch fills one with zeros, adds a few rows of it up and adds all of it to the head's: five passes over the largest
parameter for what a batch's tokens are. N tokens, H hidden width.
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
    """Run forward and backward in it: at its end the rows of the batch's tokens are added to the gradient that the head has left."""
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
    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight_VH: Tensor, waiting: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        # ctx is Any: torch does not type what a context carries
        ctx.ids, ctx.waiting = ids, waiting
        return nn.functional.embedding(ids, weight_VH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.waiting.append((ctx.ids, grad))
        return None, None, None
