from pathlib import Path

import pytest
import torch
from torch import Tensor

from worker.distill.data.batching import collate
from worker.distill.data.rows import Example
from worker.distill.forward.hidden_states import hidden_rows_alone
from worker.distill.students.activation_checkpointing import checkpoint_activations
from worker.distill.students.recipe import load_model

SOURCE = tuple(range(40, 52))


def gradients(folder: Path, *, has_checkpointing: bool) -> tuple[dict[str, Tensor], int]:
    """The gradients of all parameters, and the bytes that were kept for the backward pass."""
    model = load_model(folder)
    if has_checkpointing:
        checkpoint_activations(model)
    source = SOURCE if model.config.is_encoder_decoder else ()
    rows = [Example(tuple(range(5, 5 + n)), ((n // 2, n),), 0, source) for n in (30, 24)]
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = hidden_rows_alone(model, collate(rows, [0, 1]))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    states.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found, sum(num_bytes for where, num_bytes in kept.items() if where not in own)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert2bert"])
def test_gradients_are_the_same_and_fewer_activations_are_kept(
    family: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}_dir")
    plain, plain_bytes = gradients(folder, has_checkpointing=False)
    checkpointed, checkpointed_bytes = gradients(folder, has_checkpointing=True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name
    assert checkpointed_bytes < 0.6 * plain_bytes  # the last of four layers keeps everything
