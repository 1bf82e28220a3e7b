"""Feature terms against plain autograd: values, gradients, positions, layers, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from app.contracts.distillation import AttentionTerm, FreshConfig, HiddenTerm
from tests.tiny import save_tiny, tiny_tokenizer
from worker.distill.data.batching import collate
from worker.distill.data.rows import Example
from worker.distill.forward.hidden_states import hidden_rows
from worker.distill.students.fresh import build_fresh, fresh_config
from worker.distill.students.recipe import freeze_encoder, load_model
from worker.distill.training.feature_losses import FeaturePlan, Features, choose_side, pair_layers
from worker.errors import InvalidStudent, UnsupportedModel
from worker.models.architectures import kind_of

PROMPTS = [(5, 6, 7, 8, 9, 10), (11, 12, 13), (20, 21, 22, 23)]
ANSWERS = [(30, 31, 32, 33), (40, 41), (50, 51, 52)]
CAUSAL = [
    Example((*p, *a), ((len(p), len(p) + len(a)),)) for p, a in zip(PROMPTS, ANSWERS, strict=True)
]
SEQ2SEQ = [
    Example((1, *a), ((1, 1 + len(a)),), source_ids=p)
    for p, a in zip(PROMPTS, ANSWERS, strict=True)
]

Load = Callable[[str], PreTrainedModel]
States = list[list[Tensor]]  # of each layer, each row


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """A function that makes a tiny teacher of four layers, 64 wide."""
    return lambda family: load_model(save_tiny(tmp_path / family, family))


def fresh(family: str, hidden_size: int = 32) -> PreTrainedModel:
    sizes: Any = {"family": family, "hidden_size": hidden_size, "num_layers": 2, "num_heads": 2}
    return build_fresh(fresh_config(FreshConfig(**sizes), tiny_tokenizer("wordpiece")), seed=1)


def examples_for(model: PreTrainedModel) -> list[Example]:
    return SEQ2SEQ if kind_of(model.config) == "seq2seq" else CAUSAL


def features_of(student: PreTrainedModel, teacher: PreTrainedModel, **terms: Any) -> Features:
    asked = {"hidden": None, "attention": None, **terms}
    rows = examples_for(teacher)
    return Features(
        FeaturePlan(load_teacher=lambda: teacher, teacher_rows=rows, seed=0, **asked), student
    )


def states(
    model: PreTrainedModel, side: str, rows: list[Example], *, end: int | None = -1
) -> States:
    """What each layer but the last puts out for each row alone, by the model's own list of hidden states."""
    found = []
    for row in rows:
        ids = torch.tensor([row.token_ids[:end]])
        inputs: dict[str, Any] = {"input_ids": ids}
        if row.source_ids:
            inputs = {"input_ids": torch.tensor([row.source_ids]), "decoder_input_ids": ids}
        elif kind_of(model.config) == "masked" and model.config.type_vocab_size > 1:
            inputs["token_type_ids"] = (
                torch.arange(ids.shape[1]) >= row.target_positions[0]
            ).long()[None]
        out = model(**inputs, output_hidden_states=True)
        name = "hidden_states" if not row.source_ids else f"{side}_hidden_states"
        found.append([layer[0] for layer in out[name][1:]])
    return [list(layer) for layer in zip(*found, strict=True)]


def targets(rows: list[Example], layer: list[Tensor]) -> Tensor:
    return torch.cat(
        [h[[p - 1 for p in row.target_positions]] for row, h in zip(rows, layer, strict=True)]
    )


def plain_pairs(
    student: PreTrainedModel, teacher: PreTrainedModel, side: str
) -> tuple[Tensor, Tensor]:
    """What the student's first layer and the teacher's second put out at the positions that fit each other."""
    mine, theirs = examples_for(student), examples_for(teacher)
    if kind_of(teacher.config) == "masked" and side == "encoder":
        plain = [
            teacher(torch.tensor([p]), output_hidden_states=True).hidden_states[2][0]
            for p in PROMPTS
        ]
        return torch.cat(states(student, side, mine)[0]), torch.cat(plain)
    end = None if kind_of(teacher.config) == "masked" else -1
    s, t = states(student, side, mine)[0], states(teacher, side, theirs, end=end)[1]
    if (
        "seq2seq" in (shapes := {kind_of(student.config), kind_of(teacher.config)})
        and len(shapes) == 2
    ):
        return targets(mine, s), targets(theirs, t)
    return torch.cat(s), torch.cat([h[: len(one)] for h, one in zip(t, s, strict=True)])


PAIRS = [
    ("bloom", "gpt2", "decoder"),
    ("gpt2", "llama", "decoder"),
    ("bloom", "bert", "decoder"),
    ("t5", "gpt2", "decoder"),
    ("t5", "bert", "encoder"),
    ("t5", "roberta", "decoder"),
    ("encoder-decoder", "t5", "encoder"),
    ("encoder-decoder", "bart", "decoder"),
    ("bloom", "t5", "decoder"),
]


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize(("student", "teacher", "side"), PAIRS)
def test_hidden_states_are_compared_as_plain_autograd_does(
    load: Load, student: str, teacher: str, side: Any, kind: Any
) -> None:
    small, big = fresh(student), load(teacher)
    term = HiddenTerm(kind=kind, weight=3.0, side=side, layer_map=((0, 1),))
    features = features_of(small, big, hidden=term)
    (projection,) = features.projections
    assert isinstance(projection, nn.Linear)
    _, terms = features.read(collate(examples_for(small), range(3)))
    parameters = [*small.parameters(), *features.projections.parameters()]
    gradients = torch.autograd.grad(terms.loss, parameters, allow_unused=True)
    mine_NH, theirs_NH = plain_pairs(small, big, side)
    mine_NH, theirs_NH = projection(mine_NH), theirs_NH.detach()
    if kind == "mse":
        plain = 3 * ((mine_NH - theirs_NH) ** 2).mean()
    else:
        norms = mine_NH.norm(dim=-1) * theirs_NH.norm(dim=-1)
        plain = 3 * (1 - (mine_NH * theirs_NH).sum(-1) / norms).mean()
    torch.testing.assert_close(terms.loss, plain, atol=1e-4, rtol=1e-4)
    assert terms.values == {"train_hidden": terms.loss.item()}
    expected = torch.autograd.grad(plain, parameters, allow_unused=True)
    for got, wanted in zip(gradients, expected, strict=True):
        assert (got is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)
    assert all(parameter.grad is None for parameter in big.parameters())


def test_attention_relations_teach_the_projections_below_them_and_nothing_else(load: Load) -> None:
    student = fresh("llama")
    features = features_of(
        student, load("gpt2"), attention=AttentionTerm(student_layer=0, teacher_layer=2)
    )
    _, terms = features.read(collate(CAUSAL, range(3)))
    terms.loss.backward()
    touched = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    layer = "model.layers.0."
    assert touched == {
        "model.embed_tokens.weight",
        f"{layer}input_layernorm.weight",
        *(f"{layer}self_attn.{name}_proj.weight" for name in "qkv"),
    }
    assert terms.values["train_attention"] > 0


@pytest.mark.parametrize(
    ("student", "teacher", "num_positions"),
    [
        ("bloom", "gpt2", (4, 6)),
        ("t5", "bert", (3, 4)),
        ("encoder-decoder", "t5", (3, 4)),
        ("llama", "bart", (2, 3)),
    ],
)
def test_padding_changes_no_term(
    load: Load, student: str, teacher: str, num_positions: tuple[int, int]
) -> None:
    small, big = fresh(student), load(teacher)
    features = features_of(small, big, hidden=HiddenTerm(), attention=AttentionTerm())
    rows = examples_for(small)
    together, first, second = (
        features.read(collate(rows, numbers))[1].values for numbers in ([1, 2], [1], [2])
    )
    for name, whole in together.items():
        mean = (num_positions[0] * first[name] + num_positions[1] * second[name]) / sum(
            num_positions
        )
        assert whole.item() == pytest.approx(mean.item(), rel=1e-3)


def test_the_rows_of_the_head_come_with_the_terms(load: Load) -> None:
    student = fresh("t5")
    batch = collate(SEQ2SEQ, range(3))
    rows_NH, _ = features_of(student, load("bert"), hidden=HiddenTerm()).read(batch)
    assert torch.equal(rows_NH, hidden_rows(student, batch))


def test_equal_widths_need_no_projection(load: Load) -> None:
    features = features_of(fresh("bloom", 64), load("gpt2"), hidden=HiddenTerm())
    assert list(features.projections.parameters()) == []


@pytest.mark.parametrize(
    ("num_student", "num_teacher", "pairs"),
    [
        (2, 4, [(0, 1), (1, 3)]),
        (3, 4, [(0, 0), (1, 1), (2, 3)]),
        (4, 2, [(0, 0), (1, 0), (2, 0), (3, 1)]),
    ],
)
def test_layers_are_spread_evenly_the_last_on_the_last(
    num_student: int, num_teacher: int, pairs: list[tuple[int, int]]
) -> None:
    assert pair_layers(HiddenTerm(), num_student, num_teacher) == pairs


def test_layers_count_from_either_end() -> None:
    assert pair_layers(HiddenTerm(layer_map=((0, 2), (-1, -1))), 2, 4) == [(0, 2), (1, 3)]
    with pytest.raises(InvalidStudent, match="the teacher has no layer 4"):
        pair_layers(HiddenTerm(layer_map=((0, 4),)), 2, 4)


@pytest.mark.parametrize(
    ("student", "teacher", "side"),
    [
        ("t5", "bert", "encoder"),
        ("t5", "t5", "encoder"),
        ("t5", "gpt2", "decoder"),
        ("bloom", "bert", "decoder"),
    ],
)
def test_auto_compares_encoders_where_both_have_one(
    load: Load, student: str, teacher: str, side: str
) -> None:
    assert choose_side("auto", load(teacher), fresh(student)) == side


def test_a_frozen_encoder_is_not_compared(load: Load) -> None:
    teacher, student = load("bert"), fresh("t5")
    freeze_encoder(student)
    assert choose_side("auto", teacher, student) == "decoder"
    with pytest.raises(InvalidStudent, match="freeze_encoder"):
        choose_side("encoder", teacher, student)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [("bloom", "bert", "a bloom model"), ("t5", "gpt2", "a gpt2 model")],
)
def test_an_encoder_that_is_not_there_is_refused(
    load: Load, student: str, teacher: str, message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=f'{message} has no encoder.*side = "decoder"'):
        choose_side("encoder", load(teacher), fresh(student))
