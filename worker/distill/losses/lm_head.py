"""Heads of language models and what a teacher offers a loss: its rows, or their expectation.

N rows (completion positions), C rows of one chunk, G rows of one group in a chunk, H hidden width, V vocabulary.
Logits exist a chunk at a time, in scratch; the elementwise passes over them go group by group.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from worker.cpu import linear_ops
from worker.distill.losses.divergences import row_dot
from worker.distill.losses.top_k import TopRows
from worker.errors import UnsupportedModel, VocabMismatch
from worker.models.architectures import bare_model, read_config

CPU_CHUNK_BYTES = 2**27  # of one chunk's logits: fewer starve the product, more only take memory
DEVICE_CHUNK_BYTES = 2**28  # the same on a GPU
LEAST_CHUNK_ROWS = 64
CPU_GROUP_BYTES = (
    2**21
)  # logits that the elementwise passes take at a time, so that they stay in the cache
BART_BIAS = "final_logits_bias"  # a buffer beside the head, [1, V], never trained


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: cap * tanh(scale * (h W^T + b) / cap), the usual head having neither.

    `num_parts` says how exactly float32 numbers are multiplied (worker.cpu.linear_ops.product).
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    num_parts: int = linear_ops.FLOAT32_PARTS

    @property
    def num_tokens(self) -> int:
        return int(self.weight_VH.shape[0])


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's side of N rows: hidden_NH is its head's input (after the final norm).

    With `expected` or `top` the rows need no teacher logits at all; then hidden_NH may be None, and the head is only
    asked for its number of tokens. `top` is used wherever it is given. With mask_N they are the rows of those targets
    alone for which it is true (worker.distill.losses.uld).
    """

    head: Head
    hidden_NH: Tensor | None = None
    expected: "ExpectedRows | None" = None
    top: TopRows | None = None
    mask_N: Tensor | None = None


@dataclass(frozen=True)
class ExpectedRows:
    """All that forward KL at temperature 1 needs of the teacher p, when the student's frozen head is the teacher's.

    With logits z = W h: KL(p || q) = sum p log p - <E_p[W], h> - E_p[b] + logsumexp(z), exactly, and its gradient
    in h is E_q[W] - E_p[W]. neg_entropy_N holds sum p log p - E_p[b]; top_N is the teacher's most likely token.
    """

    head_NH: Tensor
    neg_entropy_N: Tensor
    top_N: Tensor

    def to(self, device: torch.device) -> "ExpectedRows":
        return ExpectedRows(
            self.head_NH.to(device), self.neg_entropy_N.to(device), self.top_N.to(device)
        )


def head_of(model: PreTrainedModel, num_tokens: int | None = None) -> Head:
    """The head of a language model, cut to the tokenizer's `num_tokens`: padding rows get no probability.

    Its input is the decoder's last states, after the layer that BERT and RoBERTa have before the matrix
    (bodies.hidden_rows); what T5 does to them in between is the head's scale. Weight and bias are the model's own
    (or views of them), so gradients reach them, and a tied embedding too.
    """
    linear = model.get_output_embeddings()
    if not isinstance(linear, torch.nn.Linear):
        raise UnsupportedModel(f"{type(model).__name__} has no plain linear head to distil through")
    if num_tokens is not None and num_tokens > linear.weight.shape[0]:
        raise VocabMismatch(
            f"the tokenizer has {num_tokens} tokens and the head only {linear.weight.shape[0]}; "
            "use the tokenizer that belongs to the model"
        )
    is_cut = num_tokens is not None and num_tokens < linear.weight.shape[0]
    bias_V = _bias_of(model, linear)
    config = model.config.decoder if model.config.model_type == "encoder-decoder" else model.config
    return Head(
        weight_VH=linear.weight[:num_tokens] if is_cut else linear.weight,
        bias_V=bias_V[:num_tokens] if is_cut and bias_V is not None else bias_V,
        scale=_scale_of(config),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _bias_of(model: PreTrainedModel, linear: torch.nn.Linear) -> Tensor | None:
    bias_V: Tensor | None = linear.bias
    buffer_1V: Tensor | None = getattr(model, BART_BIAS, None)
    return bias_V if buffer_1V is None else buffer_1V[0]


def _scale_of(config: PretrainedConfig) -> float:
    if (
        config.model_type == "t5" and config.scale_decoder_outputs
    ):  # a T5 whose embedding is tied to the head
        return float(config.d_model**-0.5)
    return float(getattr(config, "logit_scale", None) or 1.0)


def load_head(
    folder: Path, num_tokens: int | None = None, *, dtype: torch.dtype = torch.float32
) -> Head:
    """The head of a model's folder, without reading the rest of its weights."""
    model = bare_model(read_config(folder))
    head = head_of(model, num_tokens)
    linear = model.get_output_embeddings()
    names = _names_of(model, linear.weight)
    weight_VH, bias_V = _find_tensor(folder, names), None
    if weight_VH is None:
        raise UnsupportedModel(
            f"no safetensors file of the model holds its head ({' or '.join(names)})"
        )
    if linear.bias is not None:
        bias_V = _find_tensor(folder, _names_of(model, linear.bias))
    elif head.bias_V is not None:
        buffer_1V = _find_tensor(folder, [BART_BIAS])
        bias_V = None if buffer_1V is None else buffer_1V[0]
    if head.bias_V is not None and bias_V is None:
        bias_V = weight_VH.new_zeros(len(weight_VH))  # as transformers does
    return replace(
        head,
        weight_VH=weight_VH[: head.num_tokens].to(dtype),
        bias_V=None if bias_V is None else bias_V[: head.num_tokens].to(dtype),
    )


def _names_of(model: PreTrainedModel, parameter: Tensor) -> list[str]:
    """What files may call a parameter of the head: its own name first, because a file may hold tied copies that differ.

    Then come the names of its tied copies, each with and without the prefix of the body.
    """
    linear = model.get_output_embeddings()
    own = next(name for name, module in model.named_modules() if module is linear)
    names = [
        name for name, other in model.named_parameters(remove_duplicate=False) if other is parameter
    ]
    names.sort(key=lambda name: not name.startswith(f"{own}."))
    names += [name.removeprefix(f"{model.base_model_prefix}.") for name in names]
    return ["embed_out.weight", *names] if model.config.model_type == "gpt_neox" else names


def _find_tensor(folder: Path, names: list[str]) -> Tensor | None:
    """The tensor with the first of the names that a safetensors file of the folder has."""
    paths: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            paths |= dict.fromkeys(tensors.keys(), path)
    for name in names:
        if name in paths:
            with safe_open(paths[name], framework="pt") as tensors:
                found: Tensor = tensors.get_tensor(name)
                return found
    return None


@torch.no_grad()
def expected_rows(hidden_NH: Tensor, head: Head, *, chunk_rows: int | None = None) -> ExpectedRows:
    """The teacher's rows reduced to what forward KL through the same head needs."""
    assert head.softcap is None, "a softcap makes the logits nonlinear in the expected head row"
    N, H = hidden_NH.shape
    dtype = scratch_dtype(head)
    expected = ExpectedRows(
        head_NH=hidden_NH.new_empty((N, H), dtype=dtype),
        neg_entropy_N=hidden_NH.new_empty(N, dtype=dtype),
        top_N=torch.empty(N, dtype=torch.int64, device=hidden_NH.device),
    )
    chunks = split_rows(N, head, chunk_rows)
    scratch_CV = new_scratch(chunks, head)
    for rows in chunks:
        p_CV = write_logits(head, hidden_NH[rows], scratch_CV)
        for group in split_groups(p_CV):
            log_p_GV = torch.log_softmax(p_CV[group], dim=-1)
            expected.top_N[rows][group] = log_p_GV.argmax(dim=-1)
            p_GV = torch.exp(log_p_GV, out=p_CV[group])
            expected.neg_entropy_N[rows][group] = row_dot(p_GV, log_p_GV)
            if head.bias_V is not None:
                expected.neg_entropy_N[rows][group] -= head.scale * (p_GV @ head.bias_V.to(dtype))
        expected.head_NH[rows] = matmul(p_CV, head).mul_(head.scale)
    return expected


@torch.no_grad()
def top_rows(hidden_NH: Tensor, head: Head, k: int, *, chunk_rows: int | None = None) -> TopRows:
    """The teacher's rows reduced to its k most likely tokens and the mass of the others."""
    assert 0 < k < head.num_tokens
    N, dtype = len(hidden_NH), scratch_dtype(head)
    top = TopRows(
        ids_NK=torch.empty((N, k), dtype=torch.int64, device=hidden_NH.device),
        log_p_NK=hidden_NH.new_empty((N, k), dtype=dtype),
        log_rest_N=hidden_NH.new_empty(N, dtype=dtype),
    )
    chunks = split_rows(N, head, chunk_rows)
    scratch_CV = new_scratch(chunks, head)
    for rows in chunks:
        z_CV = write_logits(head, hidden_NH[rows], scratch_CV)
        for group in split_groups(z_CV):
            log_p_GV = torch.log_softmax(z_CV[group], dim=-1)
            log_p_GK, ids_GK = log_p_GV.topk(k, dim=-1)
            top.ids_NK[rows][group], top.log_p_NK[rows][group] = ids_GK, log_p_GK
            # summed up, because 1 - sum(p) would round to nothing
            log_p_GV.scatter_(1, ids_GK, -torch.inf)
            top.log_rest_N[rows][group] = log_p_GV.logsumexp(dim=-1)
    return top


def write_logits(head: Head, hidden_CH: Tensor, scratch_CV: Tensor) -> Tensor:
    """Logits of a chunk, in the first rows of the scratch where torch's product writes them."""
    z_CV = scratch_CV[: len(hidden_CH)]
    if head.weight_VH.dtype == z_CV.dtype:
        hidden_CH = hidden_CH.to(z_CV.dtype)
        z_CV = linear_ops.product(hidden_CH, head.weight_VH, room_NO=z_CV, num_parts=head.num_parts)
    else:
        z_CV.copy_(hidden_CH.to(head.weight_VH.dtype) @ head.weight_VH.t())
    if head.bias_V is not None:
        z_CV += head.bias_V
    if head.scale != 1.0:
        z_CV *= head.scale
    if head.softcap is not None:
        z_CV.div_(head.softcap).tanh_().mul_(head.softcap)
    return z_CV


def matmul(slope_CV: Tensor, head: Head) -> Tensor:
    """Product with the head's matrix, [C, H], in its precision."""
    weight_VH = head.weight_VH
    return linear_ops.product(slope_CV.to(weight_VH.dtype), weight_VH.t(), num_parts=head.num_parts)


class HeadGradient:
    """The gradient in a head's matrix: sum of slope^T h over chunks, in `dtype`."""

    def __init__(self, dtype: torch.dtype, num_parts: int = linear_ops.FLOAT32_PARTS) -> None:
        self._dtype = dtype
        self._num_parts = num_parts
        self._sum_VH: Tensor | None = None

    def add(self, slope_CV: Tensor, hidden_CH: Tensor) -> None:
        slope_CV = slope_CV.to(hidden_CH.dtype)
        if self._sum_VH is None:
            self._sum_VH = self._product(slope_CV, hidden_CH).to(self._dtype)
        elif self._dtype != hidden_CH.dtype:
            self._sum_VH.add_(self._product(slope_CV, hidden_CH))
        else:
            self._product(slope_CV, hidden_CH, onto_VH=self._sum_VH)

    def _product(
        self, slope_CV: Tensor, hidden_CH: Tensor, onto_VH: Tensor | None = None
    ) -> Tensor:
        return linear_ops.weight_gradient(
            slope_CV, hidden_CH, onto_OI=onto_VH, num_parts=self._num_parts
        )

    def of(self, weight_VH: Tensor) -> Tensor:
        """The sum, as the gradient of this weight."""
        return (
            torch.zeros_like(weight_VH)
            if self._sum_VH is None
            else self._sum_VH.to(weight_VH.dtype)
        )


def scratch_dtype(head: Head) -> torch.dtype:
    """Logits are float32 at least, whatever the weights are."""
    return torch.promote_types(head.weight_VH.dtype, torch.float32)


def new_scratch(chunks: list[slice], head: Head) -> Tensor:
    """Room for the logits of the largest chunk."""
    num_rows = max((rows.stop - rows.start for rows in chunks), default=0)
    return torch.empty(
        (num_rows, head.num_tokens), dtype=scratch_dtype(head), device=head.weight_VH.device
    )


def split_rows(num_rows: int, head: Head, chunk_rows: int | None) -> list[slice]:
    """Chunks of nearly equal size: a last one of two rows would read the whole head for little."""
    num_bytes = CPU_CHUNK_BYTES if head.weight_VH.device.type == "cpu" else DEVICE_CHUNK_BYTES
    most = chunk_rows or max(LEAST_CHUNK_ROWS, num_bytes // (4 * head.num_tokens))
    num_chunks = -(-num_rows // most)
    edges = [num_rows * i // num_chunks for i in range(num_chunks + 1)] if num_chunks else []
    return [slice(start, stop) for start, stop in pairwise(edges)]


def split_groups(z_CV: Tensor) -> list[slice]:
    """Rows that one elementwise pass takes: all on a GPU, what fits in the cache on a CPU."""
    size = max(1, len(z_CV))
    if z_CV.device.type == "cpu":
        size = max(1, CPU_GROUP_BYTES // (z_CV.element_size() * z_CV.shape[1]))
        size -= size % 2 if size > 1 else 0  # rows are dealt out to the threads whole
    return [slice(start, start + size) for start in range(0, len(z_CV), size)]
