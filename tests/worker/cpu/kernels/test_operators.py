"""The training kernels as operators of PyTorch: schema, fake implementation, gradients, tracing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from worker.cpu.kernels import operators
from worker.cpu.kernels.bindings import kernels

pytestmark = pytest.mark.skipif(kernels() is None, reason="no C compiler here")


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


CALLS: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {  # Any: an operator, its arguments
    "rms_norm": lambda: (operators.rms_norm, (leaf(3, 5, 8), leaf(8), 1e-5)),
    "rms_norm, frozen": lambda: (operators.rms_norm, (leaf(3, 5, 8), torch.ones(8), 1e-5)),
    "swiglu": lambda: (operators.swiglu, (leaf(4, 8), leaf(4, 8))),
    "rotate": lambda: (
        operators.rotate,
        (leaf(2, 5, 3, 16), torch.randn(2, 5, 16), torch.randn(2, 5, 16), False),
    ),
    "causal_attention": lambda: (
        operators.causal_attention,
        (leaf(2, 21, 4, 16), leaf(2, 21, 2, 16), leaf(2, 21, 2, 16), 0.2),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_operator_passes_the_checks_of_pytorch(name: str) -> None:
    torch.manual_seed(0)
    operator, arguments = CALLS[name]()
    results = torch.library.opcheck(operator, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


def test_the_gradients_of_a_rotation_are_those_of_its_formula() -> None:
    torch.manual_seed(0)
    x, cos, sin = leaf(2, 5, 3, 16), torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    slope = torch.randn(2, 5, 3, 16)
    (operators.rotate(x, cos, sin, False) * slope).sum().backward()
    plain = x.detach().requires_grad_()
    swapped = torch.cat((-plain[..., 8:], plain[..., :8]), dim=-1)
    ((plain * cos[:, :, None] + swapped * sin[:, :, None]) * slope).sum().backward()
    torch.testing.assert_close(x.grad, plain.grad)
