"""Layer fitting: ridge regression before training, by which kept layers make up for dropped ones.

A kept layer replaces itself and the dropped layers that follow it; the first kept layer also those
before it. The writers of a layer are the matrices that add to the residual stream, such as the
attention's output projection. Each writer is changed so that the stream after it comes close to the
start model's, after the same writer of the last replaced layer.

Layers are fitted in order, each on the output of the fitted ones before it. Layers before the first
gap stay as they are, except in a decoder after a fitted encoder. See
docs/decisions/0011-fitted-layers.md. Related work: ReplaceMe (arXiv:2505.02819), which fits one
linear map per gap by least squares.

P positions of a batch. N positions that count: no padding, and no first token of a causal model. I
inputs and H outputs of a writer, where H is the hidden width.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from app.contracts.run_limits import FIT_BYTES, FIT_ROWS
from worker.cpu import matmul, prepare_for_inference, weight_gradient
from worker.distill.data.batching import Batch, collate, flat_positions, model_input
from worker.distill.data.rows import Example
from worker.distill.forward.hidden_states import run_body
from worker.distill.forward.packing import Packing, packing_of
from worker.distill.students.layer_dropping import layer_stacks
from worker.distill.students.recipe import StudentRecipe, load_model
from worker.distill.training.devices import ON_CPU, Placement
from worker.host_copies import to_device
from worker.models.architectures import layer_counts, read_config

MOST_SCORES = 2**27  # attention scores of one layer over all rows at once
RIDGE = 0.3  # penalty, as a share of the mean square of an input (bench/LOG.md)
# names of the matrices that add to the residual stream, over all model families
WRITERS = frozenset(
    ("o_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "out_proj", "fc2", "o", "wo")
)
# Largest relative difference between a layer's output and the sum of its input and its writers'
# outputs. Float32 rounding stays far below it.
MOST_OFF = 1e-3
ROUNDINGS = 4  # the same for a lower dtype, in units of its epsilon
NOT_PLAIN = "the layers of this model family do more than add to the residual stream"

Site = tuple[str, int, int]  # name of a stack, number of a layer, number of a writer in it
Visit = Callable[[Site, nn.Module, Tensor, Tensor], Tensor | None]


class NoPlainStream(Exception):
    """A layer does more with the residual stream than add to it, so it cannot be fitted."""


@dataclass(frozen=True)
class Stack:
    """A student's stack. `fitted` maps each layer to fit to the start's layer that it imitates."""

    name: str
    fitted: Mapping[int, int]


@dataclass(frozen=True)
class Fit:
    """Result of a layer fitting. `why_not` gives the reason if the layers could not be fitted."""

    num_layers: int = 0
    num_rows: int = 0
    seconds: float = 0.0
    why_not: str | None = None

    @property
    def message(self) -> str:
        """The message for the job's events, empty if there was nothing to fit."""
        if self.why_not is not None:
            return f"no layers are fitted in closed form: {self.why_not}"
        fitted = f"fitted {self.num_layers} layers in closed form on {self.num_rows} rows in {self.seconds:.0f} s"
        return fitted if self.num_layers else ""


def fit_student(
    model: PreTrainedModel,
    recipe: StudentRecipe,
    rows: Sequence[Example],
    matmul_dtype: torch.dtype,
    on_progress: Callable[[], None],
    *,
    placement: Placement = ON_CPU,
) -> Fit:
    """Fits the student's layers on the first of these rows.

    The start model may be as large as a teacher, so it is loaded where the placement has room for a
    second model. On a CPU its matmuls round to `matmul_dtype`, as the student's do.
    """
    stacks = stacks_to_fit(recipe, model, read_config(recipe.start_dir))
    if not stacks:
        return Fit()
    begun = time.monotonic()
    asked = FIT_ROWS if recipe.student.fit_rows == "auto" else recipe.student.fit_rows
    rows = rows[: rows_that_fit(rows[:asked], stacks, model)]
    start = load_start(recipe, placement)
    prepare_for_inference(start, dtype=matmul_dtype, fuses_layers=True)
    try:
        fit_layers(model, start, stacks, rows, on_progress)
    except NoPlainStream as e:
        return Fit(why_not=str(e))
    return Fit(sum(len(stack.fitted) for stack in stacks), len(rows), time.monotonic() - begun)


def load_start(recipe: StudentRecipe, placement: Placement) -> PreTrainedModel:
    """Loads the model that the student's layers come from, beside the student."""
    device, dtype = placement.beside_student
    start: PreTrainedModel = load_model(recipe.start_dir, dtype).to(device)
    return start.requires_grad_(False)


def stacks_to_fit(
    recipe: StudentRecipe, student: PreTrainedModel, start: PretrainedConfig
) -> list[Stack]:
    """Returns the stacks that lost layers: of the encoder, of the decoder, or of both.

    Returns none if the recipe does not fit layers.
    """
    if not recipe.fits_layers or recipe.layers is None:
        return []
    names = layer_stacks(student)
    both = list(zip((recipe.encoder_layers, recipe.layers), layer_counts(start), strict=True))
    stacks: list[Stack] = []
    for name, (numbers, num_available) in zip(names, both[-len(names) :], strict=True):
        if numbers is None:
            continue
        stands_for = [*(number - 1 for number in numbers[1:]), num_available - 1]
        moved = (
            j
            for j, (own, last) in enumerate(zip(numbers, stands_for, strict=True))
            if not own == last == j
        )
        # after a fitted encoder, every layer of the decoder reads other states
        first = 0 if stacks else next(moved, len(numbers))
        if first < len(numbers):
            stacks.append(Stack(name, {j: stands_for[j] for j in range(first, len(numbers))}))
    return stacks


def rows_that_fit(rows: Sequence[Example], stacks: Sequence[Stack], model: PreTrainedModel) -> int:
    """Returns how many of the rows have residual streams of at most FIT_BYTES in total.

    Assumes two writers per layer, as most families have.
    """
    hidden_size = int(model.config.get_text_config(decoder=True).hidden_size)
    bytes_per_token = sum(2 * 4 * hidden_size * len(stack.fitted) for stack in stacks)
    num_bytes = 0
    for number, row in enumerate(rows):
        num_bytes += row.num_tokens * bytes_per_token
        if num_bytes > FIT_BYTES:
            return max(1, number)
    return len(rows)


@torch.no_grad()
def fit_layers(
    student: PreTrainedModel,
    start: PreTrainedModel,
    stacks: Sequence[Stack],
    rows: Sequence[Example],
    on_progress: Callable[[], None],
) -> None:
    """Changes the student's writers in place.

    `on_progress` is called after each writer, and may raise. Raises NoPlainStream before any weight
    is changed if the start model has such layers.
    """
    batch = collate(rows, range(len(rows)), str(student.device))
    start_batch, packing = batch, None
    if (start.device, start.dtype) == (student.device, student.dtype):
        packing = packing_of(student, batch, most_scores=MOST_SCORES)
    else:  # both models read the padded batch, so that their positions agree
        start_batch = collate(rows, range(len(rows)), str(start.device))
    counts = positions_that_count(student, batch, packing)
    start_counts = {name: to_device(places_N, start.device) for name, places_N in counts.items()}
    counts = {name: to_device(places_N, student.device) for name, places_N in counts.items()}
    wanted: dict[Site, Tensor] = {}

    def hear(site: Site, writer: nn.Module, inputs_PI: Tensor, stream_PH: Tensor) -> None:
        """Records the start model's stream after a writer."""
        heard_NH = stream_PH.index_select(0, start_counts[site[0]])
        wanted[site] = to_device(heard_NH, student.device).to(student.dtype)
        on_progress()

    with _followed(start, {stack.name: stack.fitted.values() for stack in stacks}, hear):
        run_body(start, start_batch, packing)
    stands_for = {stack.name: stack.fitted for stack in stacks}

    def fit(site: Site, writer: nn.Module, inputs_PI: Tensor, stream_PH: Tensor) -> Tensor:
        """Fits a writer of the student, and returns the change of its output."""
        name, layer, number = site
        goal_NH = wanted.pop((name, stands_for[name][layer], number))
        # a norm follows, so each position gets the same weight regardless of magnitude
        weights_N = goal_NH.pow(2).mean(dim=1).reciprocal()
        bias_H = writer.bias if isinstance(writer.bias, Tensor) else None
        left_NH = goal_NH - stream_PH.index_select(0, counts[name])
        inputs_NI = inputs_PI.index_select(0, counts[name])
        D_HI, b_H = ridge(inputs_NI, left_NH, weights_N, has_bias=bias_H is not None)
        writer.get_parameter("weight").add_(D_HI.t() if isinstance(writer, Conv1D) else D_HI)
        if bias_H is not None:
            bias_H.add_(b_H)
        on_progress()
        return matmul(inputs_PI, D_HI, b_H)

    with _followed(student, stands_for, fit):
        run_body(student, batch, packing)


def ridge(
    inputs_NI: Tensor, wanted_NH: Tensor, weights_N: Tensor, *, has_bias: bool
) -> tuple[Tensor, Tensor]:
    """Returns D [H, I] and b [H] that minimise the weighted squares of wanted - inputs D^T - b.

    The penalty is RIDGE times the mean square of an input, times the squares of D. Without
    `has_bias`, b is zero. Sums are taken in float32, and the system is solved in float64. If there
    is no solution (all inputs zero, or some not finite), D and b are zero.
    """
    weights_N1 = (weights_N / weights_N.sum())[:, None]
    mean_I, mean_H = (
        inputs_NI.new_zeros(inputs_NI.shape[1]),
        wanted_NH.new_zeros(wanted_NH.shape[1]),
    )
    if has_bias:
        mean_I, mean_H = (weights_N1 * inputs_NI).sum(dim=0), (weights_N1 * wanted_NH).sum(dim=0)
        inputs_NI, wanted_NH = inputs_NI - mean_I, wanted_NH - mean_H
    weighted_NI = inputs_NI * weights_N1
    gram_II = weight_gradient(weighted_NI, inputs_NI).double()
    moments_HI = weight_gradient(wanted_NH, weighted_NI).double()
    gram_II.diagonal().add_(RIDGE * gram_II.diagonal().mean())
    factor_II, num_bad = torch.linalg.cholesky_ex(gram_II)
    D_HI = torch.cholesky_solve(moments_HI.t(), factor_II).t().to(inputs_NI.dtype).contiguous()
    # a choice on the device, because the host would wait for a GPU to read the condition
    is_solved = (num_bad == 0) & D_HI.isfinite().all()
    return D_HI.where(is_solved, 0.0), (mean_H - D_HI @ mean_I).where(is_solved, 0.0)


def positions_that_count(
    model: PreTrainedModel, batch: Batch, packing: Packing | None
) -> dict[str, Tensor]:
    """Returns the positions to fit on for each stack, as numbers in the flattened batch, on the CPU.

    Padding is left out, and so is a causal model's first token, which attracts attention and
    carries no content.
    """
    *encoder, decoder = layer_stacks(model)
    num_columns = batch.input_ids_BT.shape[1]
    lengths = [len(model_input(row)) for row in batch.rows]
    if batch.source_ids_BS is not None:
        sources = [range(len(row.source_ids)) for row in batch.rows]
        return {
            encoder[0]: flat_positions(sources, batch.source_ids_BS.shape[1]),
            decoder: flat_positions([range(length) for length in lengths], num_columns),
        }
    if packing is None:
        return {decoder: flat_positions([range(1, length) for length in lengths], num_columns)}
    counts_BT = batch.attention_mask_BT.bool()
    counts_BT[:, 0] = False
    return {decoder: packing.packed(counts_BT)[0].nonzero()[:, 0]}


@contextmanager
def _followed(
    model: PreTrainedModel, layers: Mapping[str, Iterable[int]], visit: Visit
) -> Iterator[None]:
    """Calls `visit` at each writer of the given layers, within the block.

    `visit` receives the writer's input [P, I] and the residual stream after it [P, H]. The result,
    if any, is added to the writer's output. Raises NoPlainStream for layers that do more than add
    to the stream: on a CPU after such a layer, on a GPU at the end of the block.
    """
    differs: list[Tensor] = []
    with ExitStack() as hooks:
        for name, numbers in layers.items():
            stack = model.get_submodule(name)
            for number in numbers:
                layer = stack.get_submodule(str(number))
                for handle in _follow_layer(layer, name, number, visit, differs):
                    hooks.callback(handle.remove)
        yield
        if differs and bool(torch.stack(differs).any()):
            raise NoPlainStream(NOT_PLAIN)


def _follow_layer(
    layer: nn.Module, name: str, number: int, visit: Visit, differs: list[Tensor]
) -> Iterator[RemovableHandle]:
    stream_PH: Tensor

    def begin(module: nn.Module, args: tuple[Tensor, ...], more: dict[str, Tensor]) -> None:
        """Takes the residual stream at the layer's input."""
        nonlocal stream_PH
        stream_PH = _flat(args[0] if args else more["hidden_states"])

    def write(which: int, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """Adds a writer's output to the stream. Raises NoPlainStream if their shapes differ."""
        nonlocal stream_PH
        out_PH = _flat(out)
        if out_PH.shape != stream_PH.shape:
            raise NoPlainStream(NOT_PLAIN)
        added_PH = visit((name, number, which), module, _flat(args[0]), stream_PH + out_PH)
        if added_PH is not None:
            out_PH = out_PH + added_PH
        stream_PH = stream_PH + out_PH
        return out_PH.view(out.shape)

    def end(module: nn.Module, args: tuple[Tensor, ...], out: Tensor | tuple[Tensor, ...]) -> None:
        """Compares the stream with the layer's output.

        Raises NoPlainStream if they differ. On a GPU the result is added to `differs` instead,
        because the host would wait for it.
        """
        out_PH = _flat(out if isinstance(out, Tensor) else out[0])
        most_off = max(MOST_OFF, ROUNDINGS * torch.finfo(out_PH.dtype).eps)
        is_off = (out_PH - stream_PH).norm() > most_off * out_PH.norm()
        if is_off.device.type != "cpu":
            differs.append(is_off)
        elif is_off:
            raise NoPlainStream(NOT_PLAIN)

    yield layer.register_forward_pre_hook(begin, with_kwargs=True)
    writers = [m for path, m in layer.named_modules() if path.rpartition(".")[2] in WRITERS]
    for which, writer in enumerate(writers):
        if isinstance(writer, nn.Linear | Conv1D):
            yield writer.register_forward_hook(partial(write, which))
    yield layer.register_forward_hook(end)


def _flat(states: Tensor) -> Tensor:
    return states.reshape(-1, states.shape[-1])
