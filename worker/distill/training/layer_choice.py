"""Chooses the layers that a student keeps, by the angles between states of the start model.

The student drops one block of consecutive layers: the one whose output has the smallest angle to its
input, on average over positions. See docs/decisions/0023-measured-layers.md.

Source: "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv:2403.17887).

N positions that count (worker.distill.training.layer_fitting). H hidden width. S states: state i is
the input of layer i, and the last state is the output of the last layer.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from math import pi

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

Angles = list[list[float]]


def measure_angles(
    recipe: StudentRecipe,
    rows: Sequence[Example],
    matmul_dtype: torch.dtype,
    placement: Placement,
) -> list[Angles]:
    """Returns the angles between all states of the start model, for each of its stacks."""
    start = load_start(recipe, placement)
    prepare_for_inference(start, dtype=matmul_dtype, fuses_layers=True)
    return [angles_between(states) for states in record_states(start, rows[:CHOICE_ROWS])]


def with_chosen_layers(recipe: StudentRecipe, angles: Sequence[Angles]) -> StudentRecipe:
    """Returns the recipe with as many layers as before, chosen by the angles of each stack."""
    layers, encoder_layers = recipe.layers, recipe.encoder_layers
    if layers is not None:
        layers = choose_layers(angles[-1], len(layers))
    if encoder_layers is not None:
        encoder_layers = choose_layers(angles[0], len(encoder_layers))
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


def angles_between(states: Sequence[Tensor]) -> Angles:
    """Returns the mean angle from state i to each later state j, as a share of a half turn."""
    states_NSH = torch.stack(list(states), dim=1)
    lengths_NS = states_NSH.norm(dim=-1).clamp(min=1e-15)
    cosines_NSS = states_NSH @ states_NSH.mT / (lengths_NS[:, :, None] * lengths_NS[:, None, :])
    angles_SS = cosines_NSS.clamp(-1.0, 1.0).arccos().mean(dim=0) / pi
    angles: Angles = angles_SS.triu(1).cpu().tolist()
    return angles


def choose_layers(angles: Angles, num_kept: int) -> tuple[int, ...]:
    """Returns the layers outside the block with the smallest angle between its input and output."""
    num_layers = len(angles) - 1
    num_dropped = num_layers - num_kept
    begin = min(range(num_kept + 1), key=lambda layer: angles[layer][layer + num_dropped])
    return (*range(begin), *range(begin + num_dropped, num_layers))
