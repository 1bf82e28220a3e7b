"""Chooses the layers that a student keeps, by how much the layers of the start model change its states.

A kept layer replaces itself and the dropped layers that follow it. What those change in the residual
stream is lost, until layer fitting makes up for a part of it. The kept layers are chosen so that
the sum of these changes is smallest. See docs/decisions/0023-measured-layers.md. Related work:
"The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv:2403.17887), which drops one block of
layers, chosen by the angle between the states before and after it.

N positions that count (worker.distill.training.layer_fitting). H hidden width. S states: state i is
the input of layer i, and the last state is the output of the last layer.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from app.contracts.run_limits import CHOICE_ROWS
from worker.cpu import prepare_for_inference
from worker.distill.data.batching import collate
from worker.distill.data.rows import Example
from worker.distill.forward.hidden_states import run_body
from worker.distill.forward.packing import packing_of
from worker.distill.students.layer_dropping import layer_stacks
from worker.distill.students.recipe import StudentRecipe
from worker.distill.training.devices import Placement
from worker.distill.training.layer_fitting import MOST_SCORES, load_start, positions_that_count
from worker.host_copies import to_device

MOST_BYTES = 2**29  # of the recorded states of all layers

Changes = list[list[float]]


def measure_changes(
    recipe: StudentRecipe,
    rows: Sequence[Example],
    matmul_dtype: torch.dtype,
    placement: Placement,
) -> list[Changes]:
    """Returns the changes between all states of the start model, for each of its stacks."""
    start = load_start(recipe, placement)
    prepare_for_inference(start, dtype=matmul_dtype, fuses_layers=True)
    return [changes_between(states) for states in record_states(start, rows[:CHOICE_ROWS])]


def with_chosen_layers(recipe: StudentRecipe, changes: Sequence[Changes]) -> StudentRecipe:
    """Returns the recipe with as many layers as before, chosen by the changes of each stack."""
    layers, encoder_layers = recipe.layers, recipe.encoder_layers
    if layers is not None:
        layers = choose_layers(changes[-1], len(layers))
    if encoder_layers is not None:
        encoder_layers = choose_layers(changes[0], len(encoder_layers))
    return replace(recipe, layers=layers, encoder_layers=encoder_layers)


@torch.no_grad()
def record_states(model: PreTrainedModel, rows: Sequence[Example]) -> list[list[Tensor]]:
    """Returns the states [N, H] of each stack: the encoder's and the decoder's, or the only one's.

    Uses fewer rows if their states would take more than `MOST_BYTES`.
    """
    hidden_size = int(model.config.get_text_config(decoder=True).hidden_size)
    names = layer_stacks(model)
    num_states = sum(1 + len(list(model.get_submodule(name).children())) for name in names)
    most_tokens = MOST_BYTES // (4 * hidden_size * num_states)
    while len(rows) > 1 and sum(row.num_tokens for row in rows) > most_tokens:
        rows = rows[:-1]
    batch = collate(rows, range(len(rows)), str(model.device))
    packing = packing_of(model, batch, most_scores=MOST_SCORES)
    counts = {
        name: to_device(places_N, model.device)
        for name, places_N in positions_that_count(model, batch, packing).items()
    }
    found: list[list[Tensor]] = [[] for _ in names]

    def before(
        place: int, module: nn.Module, args: tuple[Tensor, ...], more: dict[str, Tensor]
    ) -> None:
        """Records the input of a layer."""
        record(place, args[0] if args else more["hidden_states"])

    def after(
        place: int, module: nn.Module, args: tuple[Tensor, ...], out: Tensor | tuple[Tensor, ...]
    ) -> None:
        """Records the output of the last layer."""
        record(place, out if isinstance(out, Tensor) else out[0])

    def record(place: int, states: Tensor) -> None:
        """Keeps the states at the positions that count."""
        flat = states.reshape(-1, states.shape[-1])
        found[place].append(flat.index_select(0, counts[names[place]]).float())

    with ExitStack() as hooks:
        for place, name in enumerate(names):
            layers = list(model.get_submodule(name).children())
            for layer in layers:
                handle = layer.register_forward_pre_hook(partial(before, place), with_kwargs=True)
                hooks.callback(handle.remove)
            hooks.callback(layers[-1].register_forward_hook(partial(after, place)).remove)
        run_body(model, batch, packing)
    return found


def changes_between(states: Sequence[Tensor]) -> Changes:
    """Returns the squared change from state i to each later state j, relative to state j.

    The mean over positions, as layer fitting weights them.
    """
    states_NSH = torch.stack(list(states), dim=1)
    products_NSS = states_NSH @ states_NSH.mT
    squares_NS = products_NSS.diagonal(dim1=1, dim2=2).clamp(min=1e-30)
    changes_NSS = squares_NS[:, :, None] + squares_NS[:, None, :] - 2 * products_NSS
    relative_SS = (changes_NSS / squares_NS[:, None, :]).mean(dim=0).clamp(min=0.0)
    found: Changes = relative_SS.triu(1).cpu().tolist()
    return found


def choose_layers(changes: Changes, num_kept: int) -> tuple[int, ...]:
    """Returns the layers to keep, for which the sum of the changes by the others is smallest."""
    num_layers = len(changes) - 1

    @cache
    def best(state: int, num_left: int) -> tuple[float, tuple[int, ...]]:
        """Returns the smallest sum from a state on, and the layers that are kept after it."""
        if num_left == 0:
            return changes[state][num_layers], ()
        return min(
            (
                changes[state][layer] + best(layer + 1, num_left - 1)[0],
                (layer, *best(layer + 1, num_left - 1)[1]),
            )
            for layer in range(state, num_layers - num_left + 1)
        )

    return best(0, num_kept)[1]
