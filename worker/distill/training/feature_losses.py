"""Feature losses: train the student's hidden states and attention relations to match the teacher's.

The teacher runs at every step, without gradient, on the batch that the student reads. So the same
batch always gives the same bits. Layer outputs are compared as they are, and that of the last layer
before the final norm. Projections between unequal widths are trained with the student and then
discarded.

B batch, T tokens, N aligned positions of all rows in order, P aligned positions of one row, H and D
widths.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig, PreTrainedModel

from app.contracts.distillation import AttentionTerm, HiddenTerm
from app.contracts.messages import ModelKind
from worker.distill.data.batching import Batch, Selection, collate, pad, read_positions
from worker.distill.data.rows import Example
from worker.distill.forward.attention_relations import (
    SelfAttention,
    choose_relation_heads,
    relation_kl,
    self_attention,
)
from worker.distill.forward.hidden_states import (
    decoder_states,
    encoder_states,
    hidden_rows,
    select,
)
from worker.distill.students.layer_dropping import layer_stacks
from worker.distill.teachers.masked_lm import segments
from worker.errors import InvalidStudent, UnsupportedModel
from worker.host_copies import to_device
from worker.models.architectures import kind_of

Side = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class FeaturePlan:
    """The requested feature losses, and the teacher with the training rows as it reads them."""

    hidden: HiddenTerm | None
    attention: AttentionTerm | None
    load_teacher: Callable[[], PreTrainedModel]
    teacher_rows: Sequence[Example]
    seed: int


@dataclass(frozen=True)
class Terms:
    """The weighted sum of the feature losses, and the value of each by the name of its metric.

    The values stay on the device: to read one, the host would wait for the GPU.
    """

    loss: Tensor
    values: dict[str, Tensor]


class Features:
    """The feature losses of one training. `projections` has parameters only if widths differ."""

    def __init__(self, plan: FeaturePlan, student: PreTrainedModel) -> None:
        """Raises UnsupportedModel or InvalidStudent if the models cannot be compared."""
        self.plan = plan
        self.student = student
        self.teacher = plan.load_teacher().eval()
        self._terms: list[_HiddenLoss | _AttentionLoss] = []
        sides = [choose_side(s, self.teacher, student) for s in self._asked_sides()]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed)
            if plan.hidden is not None:
                self._terms.append(_HiddenLoss(plan.hidden, sides[0], student, self.teacher))
            if plan.attention is not None:
                self._terms.append(_AttentionLoss(plan.attention, sides[-1], student, self.teacher))
        projections = [term.projections for term in self._terms if isinstance(term, _HiddenLoss)]
        self.projections = (projections[0] if projections else nn.ModuleList()).to(student.device)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the metrics that `read` returns."""
        return tuple(term.name for term in self._terms)

    def _asked_sides(self) -> list[str]:
        hidden = [] if self.plan.hidden is None else [self.plan.hidden.side]
        return [*hidden, *([] if self.plan.attention is None else ["auto"])]

    def read(self, batch: Batch, rollouts: Sequence[Example] = ()) -> tuple[Tensor, Terms]:
        """Returns the student's `hidden_rows` of the batch, and the losses.

        Both come from one forward pass. `rollouts` are the batch's rows as the teacher reads them,
        if they are not rows of the data.
        """
        examples = rollouts or [self.plan.teacher_rows[i] for i in batch.indices]
        taps = [Tap(term.student_modules) for term in self._terms]
        with Taps(taps):
            rows_NH = hidden_rows(self.student, batch)
        loss, values = torch.zeros((), device=rows_NH.device), {}
        for side in dict.fromkeys(term.side for term in self._terms):
            terms = [
                (term, tap)
                for term, tap in zip(self._terms, taps, strict=True)
                if term.side == side
            ]
            teachers = [Tap(term.teacher_modules) for term, _ in terms]
            with Taps(teachers):
                theirs = run_teacher(
                    self.teacher, side, batch, examples, kind_of(self.student.config)
                )
            mine = student_positions(batch, side, self.teacher, self.student)
            # the losses are always float32
            with torch.autocast(rows_NH.device.type, enabled=False):
                for (term, tap), teacher in zip(terms, teachers, strict=True):
                    value = term.weight * term(tap.outputs, mine, teacher.outputs, theirs)
                    loss = loss + value
                    values[term.name] = value.detach()
        return rows_NH, Terms(loss, values)


def choose_side(asked: str, teacher: PreTrainedModel, student: PreTrainedModel) -> Side:
    """Returns which layers are compared, those of the encoders or of the decoders.

    "auto" chooses the encoders if both models have one and the student's is trained.

    Raises UnsupportedModel or InvalidStudent if "encoder" is requested and cannot be used.
    """
    mine, theirs = kind_of(student.config), kind_of(teacher.config)
    has_encoders = mine == "seq2seq" and theirs != "causal"
    is_trained = mine == "seq2seq" and any(
        p.requires_grad for p in student.get_encoder().parameters()
    )
    if asked == "auto":
        return "encoder" if has_encoders and is_trained else "decoder"
    if asked == "decoder":
        return "decoder"
    if not has_encoders:
        name = student.config.model_type if mine != "seq2seq" else teacher.config.model_type
        raise UnsupportedModel(
            f'a {name} model has no encoder to compare; use objective.hidden.side = "decoder"'
        )
    if not is_trained:
        raise InvalidStudent(
            "the student's encoder is frozen, so its hidden states cannot change; use student.freeze_encoder = false, or "
            'objective.hidden.side = "decoder"'
        )
    return "encoder"


def reads_alike(teacher: ModelKind, student: ModelKind) -> bool:
    """Returns whether both models read the same tokens at the same positions.

    Models of the same kind do, and so do a masked teacher and a causal student.
    """
    return teacher == student or (teacher == "masked" and student == "causal")


def student_positions(
    batch: Batch, side: Side, teacher: PreTrainedModel, student: PreTrainedModel
) -> Selection:
    """Returns the positions at which the student's states are compared.

    These are all its tokens if both models read alike, else the positions that predict targets.
    """
    is_all = reads_alike(kind_of(teacher.config), kind_of(student.config))
    return Selection.of_batch(batch, is_source=side == "encoder", is_all=is_all)


@torch.no_grad()
def run_teacher(
    teacher: PreTrainedModel,
    side: Side,
    batch: Batch,
    examples: Sequence[Example],
    student: ModelKind,
) -> Selection:
    """Runs the teacher on the batch and returns its positions that match the student's.

    Hooks on the teacher's layers collect the states.
    """
    device = batch.input_ids_BT.device
    kind = kind_of(teacher.config)
    is_all = reads_alike(kind, student)
    if kind == "masked" and side == "encoder":
        teacher.base_model(input_ids=batch.source_ids_BS, attention_mask=batch.source_mask_BS)
        return Selection.of_batch(batch, is_source=side == "encoder", is_all=is_all)
    # A masked model also reads the last token. Models that predict from left to right omit it.
    if kind == "masked":
        ids_BT, mask_BT = (to_device(t, device) for t in pad([row.token_ids for row in examples]))
        types = segments(teacher, examples, ids_BT.shape[1])
        teacher.base_model(input_ids=ids_BT, attention_mask=mask_BT, **types)
        return Selection.of(read_positions(examples, is_all=is_all), ids_BT.shape[1], device)
    theirs = collate(examples, range(len(examples)), str(device))
    if side == "encoder":
        encoder_states(teacher, theirs)
    else:
        decoder_states(teacher, theirs)
    return Selection.of_batch(theirs, is_source=side == "encoder", is_all=is_all)


def pair_layers(term: HiddenTerm, num_student: int, num_teacher: int) -> list[tuple[int, int]]:
    """Returns pairs of a student layer and a teacher layer, both counted from 0.

    Without a `layer_map`, the student's layers are spread evenly, and the last is paired with the
    last.
    """
    if term.layer_map is None:
        return [(i, max(0, (i + 1) * num_teacher // num_student - 1)) for i in range(num_student)]
    where = "objective.hidden.layer_map"
    return [
        (
            number_of(mine, num_student, f"{where}: the student"),
            number_of(theirs, num_teacher, f"{where}: the teacher"),
        )
        for mine, theirs in term.layer_map
    ]


def number_of(layer: int, num_layers: int, whose: str) -> int:
    """Returns a layer's index from 0. A negative number counts from the end.

    Raises InvalidStudent if there is no such layer.
    """
    if not -num_layers <= layer < num_layers:
        raise InvalidStudent(
            f"{whose} has no layer {layer}: it has {num_layers} layers, counted from 0"
        )
    return layer % num_layers


def layers_of(model: PreTrainedModel, side: Side) -> list[nn.Module]:
    """Returns the layers of the encoder or of the decoder."""
    stacks = layer_stacks(model)
    return list(model.get_submodule(stacks[0 if side == "encoder" else -1]).children())


def side_config(config: PretrainedConfig, side: Side) -> PretrainedConfig:
    """Returns the half's configuration if the model is composed of two models, else `config`."""
    return getattr(config, side) if config.model_type == "encoder-decoder" else config


class _HiddenLoss:
    name = "train_hidden"

    def __init__(
        self, term: HiddenTerm, side: Side, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        self.kind, self.weight, self.side = term.kind, term.weight, side
        mine, theirs = layers_of(student, side), layers_of(teacher, side)
        pairs = pair_layers(term, len(mine), len(theirs))
        self.student_modules = [mine[i] for i, _ in pairs]
        self.teacher_modules = [theirs[j] for _, j in pairs]
        narrow, wide = (int(side_config(m.config, side).hidden_size) for m in (student, teacher))
        projections = [nn.Identity() if narrow == wide else nn.Linear(narrow, wide) for _ in pairs]
        self.projections = nn.ModuleList(projections)

    def __call__(
        self,
        students_BTH: Sequence[Tensor],
        mine: Selection,
        teachers_BTH: Sequence[Tensor],
        theirs: Selection,
    ) -> Tensor:
        losses = []
        for projection, mine_BTH, theirs_BTH in zip(
            self.projections, students_BTH, teachers_BTH, strict=True
        ):
            mine_NH, theirs_NH = (
                projection(select(mine_BTH, mine.positions_N).float()),
                select(theirs_BTH, theirs.positions_N).float(),
            )
            if self.kind == "mse":
                losses.append((mine_NH - theirs_NH).square().mean())
            else:
                losses.append(
                    1 - nn.functional.cosine_similarity(mine_NH, theirs_NH, dim=-1).mean()
                )
        return torch.stack(losses).mean()


class _AttentionLoss:
    name = "train_attention"

    def __init__(
        self, term: AttentionTerm, side: Side, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        self.weight, self.side = term.weight, side
        self._student = attention_of(
            student, side, term.student_layer, "objective.attention: the student"
        )
        self._teacher = attention_of(
            teacher, side, term.teacher_layer, "objective.attention: the teacher"
        )
        self.student_modules, self.teacher_modules = self._student.modules, self._teacher.modules
        heads = int(side_config(teacher.config, side).num_attention_heads)
        widths = self._student.widths | self._teacher.widths
        self.num_heads = choose_relation_heads(term.num_relation_heads, heads, widths)

    def __call__(
        self,
        students_BTD: Sequence[Tensor],
        mine: Selection,
        teachers_BTD: Sequence[Tensor],
        theirs: Selection,
    ) -> Tensor:
        pairs = zip(
            self._student.split(students_BTD), self._teacher.split(teachers_BTD), strict=True
        )
        losses = [
            relation_kl(
                table_of(student_BTD, mine),
                table_of(teacher_BTD, theirs),
                mine.mask_BP,
                mine.places_N,
                num_heads=self.num_heads,
            )
            for student_BTD, teacher_BTD in pairs
        ]
        return torch.stack(losses).sum()


def attention_of(model: PreTrainedModel, side: Side, layer: int, whose: str) -> SelfAttention:
    """Returns the self-attention of one layer. Raises InvalidStudent if there is no such layer."""
    layers = layers_of(model, side)
    heads = int(side_config(model.config, side).num_attention_heads)
    return self_attention(layers[number_of(layer, len(layers), whose)], heads)


def table_of(x_BTD: Tensor, selected: Selection) -> Tensor:
    """Returns the selected positions of each row, padded with zeros at the end: [B, P, D]."""
    rows_ND = select(x_BTD, selected.positions_N).float()
    table_MD = rows_ND.new_zeros((selected.mask_BP.numel(), rows_ND.shape[1]))
    return table_MD.index_copy(0, selected.places_N, rows_ND).view(*selected.mask_BP.shape, -1)


class Tap:
    """Collects the outputs of modules during a forward pass."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self._outputs: dict[int, Tensor] = {}

    @property
    def outputs(self) -> list[Tensor]:
        """The outputs in the order of the modules. A module may occur twice."""
        return [self._outputs[id(module)] for module in self.modules]

    def open(self) -> list[RemovableHandle]:
        return [
            module.register_forward_hook(self._keep)
            for module in {id(m): m for m in self.modules}.values()
        ]

    # Any: a layer returns a tensor or a tuple of tensors
    def _keep(self, module: nn.Module, _: Any, output: Any) -> None:
        self._outputs[id(module)] = output[0] if isinstance(output, tuple) else output


class Taps:
    """Context manager that opens several taps."""

    def __init__(self, taps: Sequence[Tap]) -> None:
        self.taps = taps
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        self._handles = [handle for tap in self.taps for handle in tap.open()]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
