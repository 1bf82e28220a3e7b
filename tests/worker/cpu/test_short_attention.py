"""Attention by whole matrices, against torch's own kernel: values, gradients, and what is left to that kernel."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.tiny import save_tiny
from worker.cpu import short_attention
from worker.cpu.kernels.bindings import kernels
from worker.cpu.short_attention import MOST_KEYS, NAME, attend, use_short_attention
from worker.distill.data.batching import collate
from worker.distill.data.rows import Example
from worker.distill.forward.hidden_states import hidden_rows
from worker.distill.students.recipe import load_model
from worker.models.architectures import CAUSAL, SEQ2SEQ

B, H, K, T, S, D = 2, 6, 2, 5, 7, 8

CAUSAL_BACKWARD = "GeneratedBackwardFor_stillhouse_causal_attention_defaultBackward"


class Layer(nn.Module):
    """What a layer tells its attention function."""

    def __init__(self, *, is_causal: bool, num_key_value_groups: int = H // K) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.num_key_value_groups = num_key_value_groups


def inputs_of(num_keys: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values."""
    generator = torch.Generator().manual_seed(0)

    def some(num_heads: int, length: int) -> Tensor:
        return torch.randn(B, num_heads, length, D, generator=generator).to(dtype).requires_grad_()

    return some(H, T), some(K, num_keys), some(K, num_keys)


def mask_of(num_queries: int, num_keys: int) -> Tensor:
    """Each row sees something, and the second batch entry less."""
    mask_BTS = torch.ones(B, 1, num_queries, num_keys, dtype=torch.bool)
    mask_BTS[1, :, :, num_keys - 2 :] = False
    mask_BTS[0, 0, 1, 2] = False
    return mask_BTS


@pytest.mark.parametrize(
    ("num_keys", "is_causal", "is_masked", "scaling"),
    [(T, True, False, None), (T, True, True, 0.3), (S, False, False, 1.0), (S, False, True, None)],
)
def test_values_and_gradients_are_those_of_torchs_kernel(
    num_keys: int, is_causal: bool, is_masked: bool, scaling: float | None
) -> None:
    found = []
    for way in (attend, sdpa_attention_forward):
        tensors = inputs_of(num_keys)
        mask = mask_of(T, num_keys) if is_masked else None
        out, _ = way(Layer(is_causal=is_causal), *tensors, mask, scaling=scaling)
        (out * torch.arange(out.numel()).view(out.shape) / out.numel()).sum().backward()
        found.append((out, *(tensor.grad for tensor in tensors)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 5, 16, 77, 128])
@pytest.mark.parametrize(("num_heads", "num_key_heads"), [(4, 4), (9, 3), (3, 1)])
@pytest.mark.parametrize("width", [16, 48, 64])
def test_a_compiled_causal_layer_is_torchs(
    length: int, num_heads: int, num_key_heads: int, width: int
) -> None:
    """Lengths that are whole blocks and others, heads that share keys, widths of one lane and of several."""
    if kernels() is None:
        pytest.skip("no C compiler here")
    generator = torch.Generator().manual_seed(length)
    heads = (num_heads, num_key_heads, num_key_heads)
    found = []
    tensors = [torch.randn(B, length, each, width, generator=generator) for each in heads]
    slope = torch.randn(B, length, num_heads, width, generator=generator)
    for way in (attend, sdpa_attention_forward):
        own = [each.clone().requires_grad_() for each in tensors]
        layer = Layer(is_causal=True, num_key_value_groups=num_heads // num_key_heads)
        query, key, value = (each.transpose(1, 2) for each in own)
        out, _ = way(layer, query, key, value, None, scaling=0.2)
        assert (type(out.grad_fn).__name__ == CAUSAL_BACKWARD) == (way is attend)
        (out * slope).sum().backward()
        found.append((out, *(each.grad for each in own)))
    for mine, theirs in zip(*found, strict=True):
        # sums of 128 in another order
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", sorted((*CAUSAL, *SEQ2SEQ)))
def test_a_model_gives_the_same_rows_and_gradients(family: str, tmp_path: Path) -> None:
    is_seq2seq = family in SEQ2SEQ
    rows = [(4, 30, 31, 32, 33), (4, 40, 41), (4, 50, 51, 52)]
    examples = [
        Example(r, ((1, len(r)),), source_ids=(5, 6, *r) if is_seq2seq else ()) for r in rows
    ]
    batch = collate(examples, range(len(examples)))
    model = load_model(save_tiny(tmp_path, family, num_layers=2))
    found = []
    for _ in range(2):
        model.zero_grad()
        rows_NH = hidden_rows(model, batch)
        weights_NH = torch.randn(rows_NH.shape, generator=torch.Generator().manual_seed(0))
        (rows_NH * weights_NH).sum().backward()
        gradients = {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }
        found.append((rows_NH.detach(), gradients))
        use_short_attention(model)
    (rows_NH, gradients), (short_NH, short_gradients) = found
    torch.testing.assert_close(short_NH, rows_NH, atol=1e-5, rtol=1e-5)
    assert short_gradients.keys() == gradients.keys()
    for (
        name,
        gradient,
    ) in gradients.items():  # float32 sums in another order, against the largest entry
        atol = 1e-6 + 1e-5 * float(gradient.abs().max())  # a bias of keys has none but rounding
        torch.testing.assert_close(short_gradients[name], gradient, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("has_kernels", [True, False])
def test_a_llama_attends_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_kernels: bool
) -> None:
    if has_kernels and kernels() is None:
        pytest.skip("no C compiler here")
    if not has_kernels:
        monkeypatch.setattr(short_attention, "kernels", lambda: None)
    model = load_model(save_tiny(tmp_path, "llama", num_layers=1))
    use_short_attention(model)
    rows_NH = model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False).logits
    names = set()
    edges = [rows_NH.grad_fn]
    while edges:
        node = edges.pop()
        names.add(node.name())
        edges += [parent for parent, _ in node.next_functions if parent is not None]
    assert model.config._attn_implementation == NAME
    assert (CAUSAL_BACKWARD if has_kernels else "_AttentionBackward") in names
    assert "_attn_implementation" not in model.config.to_dict()


@pytest.mark.parametrize(
    ("num_keys", "dtype", "more"),
    [
        (MOST_KEYS + 1, torch.float32, {}),
        (T, torch.float64, {}),
        (T, torch.float32, {"position_bias": torch.zeros(1, H, T, T)}),
    ],
)
def test_what_it_does_not_know_is_left_to_torchs_kernel(
    num_keys: int, dtype: torch.dtype, more: dict[str, Tensor]
) -> None:
    tensors = inputs_of(num_keys, dtype)
    out, _ = attend(Layer(is_causal=False), *tensors, None, **more)
    expected, _ = sdpa_attention_forward(Layer(is_causal=False), *tensors, None, **more)
    assert torch.equal(out, expected)


def test_without_gradients_torchs_kernel_is_used() -> None:
    tensors = inputs_of(T)
    with torch.no_grad():
        out, _ = attend(Layer(is_causal=True), *tensors, None)
    assert out.grad_fn is None
