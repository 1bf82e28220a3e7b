"""LM heads, and the teacher's inputs to the loss: hidden states, top-k tokens or expectations.

Logits are computed chunk by chunk in a scratch buffer. Elementwise passes over a chunk go group by
group.

N rows (one per target), C rows of a chunk, G rows of a group within a chunk. H hidden width,
V vocabulary, K most likely tokens per row.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from app.contracts.run_limits import CPU_CHUNK_BYTES, DEVICE_CHUNK_BYTES
from worker import cpu
from worker.distill.losses.divergences import row_dot
from worker.distill.losses.top_k import TopRows
from worker.errors import UnsupportedModel, VocabMismatch
from worker.models.architectures import bare_model, read_config

LEAST_CHUNK_ROWS = 64
CPU_GROUP_BYTES = 2**21  # logits of a group, which has to fit in the CPU cache
BART_BIAS = "final_logits_bias"  # a buffer of shape [1, V] in BART models, never trained


@dataclass(frozen=True)
class Head:
    """LM head, which computes the logits cap * tanh(scale * (h W^T + b) / cap) from hidden states.

    Most models have neither a scale nor a softcap. `body_dtype` is the dtype of the matmuls of
    the model's other layers on a CPU. It decides how exact those of the head must be.
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    body_dtype: torch.dtype = torch.float32

    @property
    def num_tokens(self) -> int:
        return int(self.weight_VH.shape[0])

    @property
    def exact(self) -> "Head":
        """The head in float32, as the loss needs it."""
        bias_V = None if self.bias_V is None else self.bias_V.float()
        return replace(self, weight_VH=self.weight_VH.float(), bias_V=bias_V)


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's inputs to the loss of N rows.

    `hidden_NH` is the input of the teacher's head, after the final norm. It may be None if
    `expected` or `top` is given, because the loss then needs no teacher logits. In that case only
    the number of tokens of `head` is used. `top` takes precedence over the other two.

    `mask_N`, if given, is on the CPU and has one entry per target. The rows then belong to the
    targets where it is true (worker.distill.losses.uld).
    """

    head: Head
    hidden_NH: Tensor | None = None
    expected: "ExpectedRows | None" = None
    top: TopRows | None = None
    mask_N: Tensor | None = None


@dataclass(frozen=True)
class ExpectedRows:
    """Statistics of the teacher p that suffice for forward KL at temperature 1.

    They apply if the student's head is frozen and is the teacher's. With logits z = W h + b, this
    is exact: KL(p || q) = sum p log p - <E_p[W], h> - E_p[b] + logsumexp(z). The gradient in h is
    E_q[W] - E_p[W]. Here W and b include the head's scale.

    `head_NH` holds E_p[W], `neg_entropy_N` holds sum p log p - E_p[b], and `top_N` is the teacher's
    most likely token.
    """

    head_NH: Tensor
    neg_entropy_N: Tensor
    top_N: Tensor

    def to(self, device: torch.device) -> "ExpectedRows":
        return ExpectedRows(
            self.head_NH.to(device), self.neg_entropy_N.to(device), self.top_N.to(device)
        )


def head_of(model: PreTrainedModel, num_tokens: int | None = None) -> Head:
    """Returns the head of a language model, cut to the tokenizer's `num_tokens`.

    The cut removes padding rows of the weight, so that they get no probability. The head's input
    comes from worker.distill.forward.hidden_states.hidden_rows, which applies the extra layer of
    BERT and RoBERTa. T5's scaling of its decoder outputs is the head's `scale`.

    Weight and bias are the model's own parameters or views of them. Gradients therefore reach the
    model, including a tied embedding.

    Raises:
        UnsupportedModel: The output layer is not a plain linear layer.
        VocabMismatch: The head has fewer than `num_tokens` tokens.
    """
    linear = model.get_output_embeddings()
    if not isinstance(linear, torch.nn.Linear):
        raise UnsupportedModel(
            f"{type(model).__name__} has no plain linear LM head, which distillation needs"
        )
    if num_tokens is not None and num_tokens > linear.weight.shape[0]:
        raise VocabMismatch(
            f"the tokenizer has {num_tokens} tokens, but the LM head only {linear.weight.shape[0]}; "
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
    # true for a T5 whose embedding is tied to the head
    if config.model_type == "t5" and config.scale_decoder_outputs:
        return float(config.d_model**-0.5)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        return 1.0 / float(divisor)
    return float(getattr(config, "logit_scale", None) or 1.0)


def load_head(
    folder: Path, num_tokens: int | None = None, *, dtype: torch.dtype = torch.float32
) -> Head:
    """Reads the head from a model folder without reading the other weights.

    Raises UnsupportedModel if no safetensors file of the folder contains it.
    """
    model = bare_model(read_config(folder))
    head = head_of(model, num_tokens)
    linear = model.get_output_embeddings()
    names = _names_of(model, linear.weight)
    weight_VH, bias_V = _find_tensor(folder, names), None
    if weight_VH is None:
        raise UnsupportedModel(
            f"no safetensors file of the model contains its LM head ({' or '.join(names)})"
        )
    if linear.bias is not None:
        bias_V = _find_tensor(folder, _names_of(model, linear.bias))
    elif head.bias_V is not None:
        buffer_1V = _find_tensor(folder, [BART_BIAS])
        bias_V = None if buffer_1V is None else buffer_1V[0]
    if head.bias_V is not None and bias_V is None:
        bias_V = weight_VH.new_zeros(len(weight_VH))  # the default of transformers
    return replace(
        head,
        weight_VH=weight_VH[: head.num_tokens].to(dtype),
        bias_V=None if bias_V is None else bias_V[: head.num_tokens].to(dtype),
    )


def is_head_of(folder: Path, head: Head) -> bool:
    """Returns whether the model in a folder has this head."""
    try:
        own = load_head(folder, head.num_tokens)
    except VocabMismatch:
        return False
    if own.weight_VH.shape != head.weight_VH.shape or (own.bias_V is None) != (head.bias_V is None):
        return False
    if own.scale != head.scale:
        return False
    is_bias_equal = (
        own.bias_V is None or head.bias_V is None or torch.equal(own.bias_V, head.bias_V)
    )
    return is_bias_equal and torch.equal(own.weight_VH, head.weight_VH.cpu())


def _names_of(model: PreTrainedModel, parameter: Tensor) -> list[str]:
    """Returns the names that a file may use for a parameter of the head, best first.

    The parameter's own name comes first, because a file may hold tied copies with other values.
    Names of tied copies follow. Each name is tried with and without the prefix of the base model.
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
    """Returns the tensor with the first name that a safetensors file of the folder contains."""
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
    """Returns the statistics of the teacher that forward KL through the same head needs."""
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
    """Returns the teacher's k most likely tokens per row, and the probability of all others."""
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
            # computed as a sum, because 1 - sum(p) could round to 0
            log_p_GV.scatter_(1, ids_GK, -torch.inf)
            top.log_rest_N[rows][group] = log_p_GV.logsumexp(dim=-1)
    return top


def write_logits(head: Head, hidden_CH: Tensor, scratch_CV: Tensor) -> Tensor:
    """Returns the logits of a chunk.

    They are in the first rows of `scratch_CV`, unless the matmul allocates its own output.
    """
    z_CV = scratch_CV[: len(hidden_CH)]
    if head.weight_VH.dtype == z_CV.dtype:
        hidden_CH = hidden_CH.to(z_CV.dtype)
        z_CV = cpu.matmul(hidden_CH, head.weight_VH, scratch_NO=z_CV, body_dtype=head.body_dtype)
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
    """Returns `slope_CV` times the head's weight, [C, H], in the dtype of the weight."""
    weight_VH = head.weight_VH
    return cpu.matmul(slope_CV.to(weight_VH.dtype), weight_VH.t(), body_dtype=head.body_dtype)


class HeadGradient:
    """Accumulates the gradient of a head's weight in `dtype`: the sum of slope^T h over chunks."""

    def __init__(self, dtype: torch.dtype, body_dtype: torch.dtype = torch.float32) -> None:
        self._dtype = dtype
        self._body_dtype = body_dtype
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
        return cpu.weight_gradient(
            slope_CV, hidden_CH, onto_OI=onto_VH, body_dtype=self._body_dtype
        )

    def of(self, weight_VH: Tensor) -> Tensor:
        """Returns the accumulated gradient in the dtype of this weight. It is 0 without chunks."""
        return (
            torch.zeros_like(weight_VH)
            if self._sum_VH is None
            else self._sum_VH.to(weight_VH.dtype)
        )


def scratch_dtype(head: Head) -> torch.dtype:
    """Returns the dtype for logits: float32, or the dtype of the weight if that is wider."""
    return torch.promote_types(head.weight_VH.dtype, torch.float32)


def new_scratch(chunks: list[slice], head: Head) -> Tensor:
    """Returns an uninitialised buffer for the logits of the largest chunk."""
    num_rows = max((rows.stop - rows.start for rows in chunks), default=0)
    return torch.empty(
        (num_rows, head.num_tokens), dtype=scratch_dtype(head), device=head.weight_VH.device
    )


def split_rows(num_rows: int, head: Head, chunk_rows: int | None) -> list[slice]:
    """Returns chunks of rows of nearly equal size.

    With fixed-size chunks the last one could be short, and would read the whole head's weight for a
    few rows.
    """
    num_bytes = CPU_CHUNK_BYTES if head.weight_VH.device.type == "cpu" else DEVICE_CHUNK_BYTES
    most = chunk_rows or max(LEAST_CHUNK_ROWS, num_bytes // (4 * head.num_tokens))
    num_chunks = -(-num_rows // most)
    edges = [num_rows * i // num_chunks for i in range(num_chunks + 1)] if num_chunks else []
    return [slice(start, stop) for start, stop in pairwise(edges)]


def split_groups(z_CV: Tensor) -> list[slice]:
    """Returns groups of rows for elementwise passes: one on a GPU, cache-sized ones on a CPU."""
    size = max(1, len(z_CV))
    if z_CV.device.type == "cpu":
        size = max(1, CPU_GROUP_BYTES // (z_CV.element_size() * z_CV.shape[1]))
        size -= size % 2 if size > 1 else 0  # even, because threads take whole rows
    return [slice(start, start + size) for start in range(0, len(z_CV), size)]
