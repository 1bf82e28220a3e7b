"""The compiled kernels against the same in torch, and a machine without a compiler."""

import copy
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from app.contracts.distillation import DivergenceName
from worker.cpu.kernels.bindings import MARGIN, MOST_REFINED, Kernels, kernels
from worker.cpu.linear_ops import HAS_BFLOAT16
from worker.cpu.llama_decoder import LlamaDecoder, head_of
from worker.cpu.training_ops import use_training_ops
from worker.distill.losses.divergences import TokenObjective
from worker.serve.decoding.cursor_batch import CursorBatch
from worker.serve.loading import load_model

FLOATS = (torch.float32, torch.bfloat16)
# float32 sums in another order; bfloat16 has 8 bits, and half a unit in the last place either way
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 2**-8}


@pytest.fixture(scope="module")
def ops() -> Kernels:
    made = kernels()
    if made is None:
        pytest.skip("no C compiler here")
    return made


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_where_there_is_a_compiler_there_are_kernels() -> None:
    assert (kernels() is not None) == (
        shutil.which("gcc") is not None or shutil.which("cc") is not None
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_add_norm_is_an_addition_and_an_rms_norm(
    ops: Kernels, dtype: torch.dtype, rows: int
) -> None:
    hidden, more, weight = (
        random(rows, 300),
        random(rows, 300, seed=1, dtype=dtype),
        random(300, seed=2),
    )
    expected = hidden + more
    normed = ops.add_norm(hidden, more, weight, 1e-5, dtype)
    assert torch.equal(hidden, expected)
    assert normed.dtype == dtype
    exact = nn.functional.rms_norm(expected, (300,), weight, 1e-5).to(dtype)
    torch.testing.assert_close(normed, exact, atol=1e-6, rtol=RELATIVE[dtype])
    alone = ops.add_norm(hidden.clone(), None, weight, 1e-5, dtype)
    assert torch.equal(alone, normed)


@pytest.mark.parametrize("dtype", FLOATS)
def test_multiply_rounds_as_torch_does(ops: Kernels, dtype: torch.dtype) -> None:
    a, b = random(7, 3001, dtype=dtype), random(7, 3001, seed=1, dtype=dtype)
    a[0, 0], a[0, 1], b[0, 2] = float("nan"), float("inf"), -0.0
    expected = a * b
    assert torch.equal(ops.multiply(a, b).nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("is_rotated", [True, False])
# one part, a broken one, and the two that are compiled for
@pytest.mark.parametrize("D", [16, 24, 64, 128])
@pytest.mark.parametrize(("num_heads", "num_key_heads"), [(6, 2), (3, 3), (4, 1), (14, 2)])
def test_attend_is_plain_attention_over_what_each_row_may_see(
    ops: Kernels, dtype: torch.dtype, is_rotated: bool, D: int, num_heads: int, num_key_heads: int
) -> None:
    N, width, column = 3, 50, 37
    projected = random(N, (num_heads + 2 * num_key_heads) * D, dtype=dtype)
    cache = (random(5, num_key_heads, width, D, seed=1), random(5, num_key_heads, width, D, seed=2))
    before = [each.clone() for each in cache]
    starts = torch.tensor([0, 30, column])
    angles = random(N, D // 2, seed=3).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    signed = torch.cat((-sin[:, : D // 2], sin[:, D // 2 :]), dim=1)
    found = ops.attend(
        projected, (cos, signed) if is_rotated else None, cache, starts,
        num_heads=num_heads, column=column, scaling=0.3,
    )  # fmt: skip
    heads = projected.float().view(N, -1, D)
    query, key, value = heads.split([num_heads, num_key_heads, num_key_heads], dim=1)
    if is_rotated:
        query, key = (
            x * cos[:, None] + torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1) * sin[:, None]
            for x in (query, key)
        )
    expected = []
    for n, start in enumerate(starts.tolist()):
        before[0][n, :, column], before[1][n, :, column] = key[n], value[n]
        for h in range(num_heads):
            k = h // (num_heads // num_key_heads)
            scores = before[0][n, k, start : column + 1] @ query[n, h] * 0.3
            expected.append(scores.softmax(0) @ before[1][n, k, start : column + 1])
    for mine, theirs in zip(cache, before, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
    # unrounded: of two float32 sums in another order, one may round up and one down
    exact = torch.stack(expected).view(N, -1)
    torch.testing.assert_close(found.float(), exact, atol=1e-5, rtol=RELATIVE[dtype])


@pytest.mark.parametrize("dtype", FLOATS)
def test_tokens_read_together_find_what_they_find_one_by_one(
    ops: Kernels, dtype: torch.dtype
) -> None:
    rows, tokens, heads, key_heads, width, column = 3, 7, 6, 2, 20, 4
    projected = random(rows * tokens, (heads + 2 * key_heads) * 16, dtype=dtype)
    rotations = random(rows * tokens, 16, seed=1), random(rows * tokens, 16, seed=2)
    # the second row begins with two tokens of padding
    starts = torch.tensor([0, column + 2, column])
    keys, values = (random(rows, key_heads, width, 16, seed=seed, dtype=dtype) for seed in (3, 4))
    attend = partial(ops.attend, num_heads=heads, scaling=0.3)
    kept = keys.clone(), values.clone()
    together = attend(projected, rotations, kept, starts, column=column)
    alone = torch.zeros_like(together)
    for n in range(rows):
        for q in range(tokens):
            at, cache = (
                slice(n * tokens + q, n * tokens + q + 1),
                (keys[n : n + 1], values[n : n + 1]),
            )
            if column + q >= starts[n]:
                turned = rotations[0][at], rotations[1][at]
                alone[at] = attend(
                    projected[at], turned, cache, starts[n : n + 1], column=column + q
                )
    assert torch.equal(together, alone)
    assert torch.equal(torch.stack(kept), torch.stack((keys, values)))
    assert not together[tokens : tokens + 2].any()
    assert together[tokens + 2 :].any(dim=1).all()


def test_a_row_that_is_no_number_spoils_no_other(ops: Kernels) -> None:
    projected, cache = random(2, 64), (random(2, 1, 8, 16), random(2, 1, 8, 16, seed=1))
    projected[0, 0] = float("nan")
    found = ops.attend(
        projected, None, cache, torch.tensor([0, 0]), num_heads=2, column=5, scaling=1.0
    )
    assert found[0, :16].isnan().all()
    assert found[1].isfinite().all()


def test_scores_far_apart_overflow_nothing(ops: Kernels) -> None:
    projected, cache = (
        random(1, 48) * 1000,
        (random(1, 1, 8, 16) * 1000, random(1, 1, 8, 16, seed=1)),
    )
    found = ops.attend(
        projected, None, cache, torch.tensor([0]), num_heads=1, column=5, scaling=1.0
    )
    assert found.isfinite().all()


def test_the_best_logits_are_exact_and_the_others_rounded(ops: Kernels) -> None:
    hidden, weight = random(6, 64), random(5000, 64, seed=1) / 2
    rounded = (hidden.bfloat16() @ weight.bfloat16().T).clone()
    found, exact = ops.refine(rounded, hidden, weight), hidden @ weight.T
    for n in range(6):
        is_near = rounded[n].float() >= rounded[n].float().max() - MARGIN
        assert 0 < is_near.sum() < MOST_REFINED
        torch.testing.assert_close(found[n][is_near], exact[n][is_near], atol=1e-5, rtol=1e-5)
        assert torch.equal(found[n][~is_near], rounded[n].float()[~is_near])


def test_a_flat_distribution_costs_no_more_than_a_bound(ops: Kernels) -> None:
    rounded, hidden, weight = (
        torch.zeros(1, 5000, dtype=torch.bfloat16),
        random(1, 8),
        random(5000, 8, seed=1),
    )
    found, exact = ops.refine(rounded, hidden, weight), hidden @ weight.T
    assert (found != 0).sum() == MOST_REFINED
    torch.testing.assert_close(
        found[0, :MOST_REFINED], exact[0, :MOST_REFINED], atol=1e-5, rtol=1e-5
    )
    assert ops.refine(rounded * float("nan"), hidden, weight).isnan().all()


def test_the_step_of_a_packed_model_is_made_of_them(ops: Kernels, tiny_llama_dir: Path) -> None:
    for keeps_plain in (True, False):  # three layers for queries, keys and values, or one
        loaded = load_model(tiny_llama_dir, keeps_plain=keeps_plain)
        assert LlamaDecoder(loaded.model)._kernels is ops
    trained = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    assert LlamaDecoder(trained)._kernels is None


@pytest.mark.parametrize("num_rows", [1, 2, 15, 16, 17, 31, 32, 33, 64, 100, 460])
@pytest.mark.parametrize(("num_in", "num_out"), [(32, 16), (96, 130), (576, 192)])
def test_a_product_of_tiles_is_a_product_and_each_rows_own(
    ops: Kernels, num_rows: int, num_in: int, num_out: int
) -> None:
    if not ops.has_tiles:
        pytest.skip("this processor has no tiles")
    weight, bias = random(num_out, num_in, dtype=torch.bfloat16), random(num_out, seed=1)
    x = random(num_rows, num_in, seed=2, dtype=torch.bfloat16)
    tiles, exact = ops.make_tiles(weight), x.double() @ weight.double().T
    exact += bias
    found = ops.multiply_tiles(x, tiles, num_out, bias, is_swish=False)
    torch.testing.assert_close(found.double(), exact, atol=1e-3, rtol=2**-8)
    swished = ops.multiply_tiles(x, tiles, num_out, bias, is_swish=True)
    torch.testing.assert_close(swished.double(), nn.functional.silu(exact), atol=1e-3, rtol=2**-8)
    for n in range(num_rows):
        alone = ops.multiply_tiles(x[n : n + 1], tiles, num_out, bias, is_swish=False)
        assert torch.equal(alone, found[n : n + 1])


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (33, 70, 31), (128, 64, 600), (32, 40_000, 65), (1300, 1000, 577)]
)
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
def test_a_split_product_is_as_exact_as_one_in_float32(
    ops: Kernels, shape: tuple[int, int, int], turned: tuple[bool, bool]
) -> None:
    """Edges, more rows than columns and fewer, results that the cache holds and others, both ways to lie."""
    if not ops.has_splits:
        pytest.skip("this CPU has no AMX")
    num_rows, num_columns, depth = shape
    a, b = random(num_rows, depth), random(num_columns, depth, seed=1)
    exact = a.double() @ b.double().t()
    size = a.double().abs() @ b.double().abs().t()
    a, b = (x.t().contiguous().t() if turns else x for x, turns in zip((a, b), turned, strict=True))
    out = ops.multiply_split(a, b)
    # float32's own products round by 2^-24 of each term, and their sums again
    assert ((out - exact).abs() / size).max() < 2**-22
    onto = random(num_rows, num_columns, seed=2)
    expected = exact + onto
    assert (
        (ops.multiply_split(a, b, onto, adds=True) - expected).abs() / (size + 1)
    ).max() < 2**-22
    few = a[:5].contiguous()
    assert torch.equal(ops.multiply_split(few, b), out[:5])
    half = ops.multiply_split(a, b, num_parts=2)
    assert ((half - exact).abs() / size).max() < 2**-15
    assert not torch.equal(half, out)


def test_a_step_has_the_same_bits_every_time_and_on_any_number_of_threads(ops: Kernels) -> None:
    """Which a resumed training relies on, though the threads take what there is to do as they come."""
    query, value = random(3, 77, 9, 32), random(3, 77, 3, 32, seed=1)
    shapes = [(700, 900, 600), (300, 200, 5000)] if ops.has_splits else []
    operands = [(random(m, k), random(n, k, seed=1)) for m, n, k in shapes]

    def results() -> list[Tensor]:
        out, weights = ops.attend_causally(query, value, value, 0.2)
        gradients = ops.attention_gradients(out, (query, value, value), weights, 0.2)
        return [
            out,
            *gradients,
            *(ops.multiply_split(a, b, num_parts=n) for a, b in operands for n in (2, 3)),
        ]

    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results()
        for count in (2, 2, 2, 3):
            torch.set_num_threads(count)
            assert all(map(torch.equal, results(), alone))
    finally:
        torch.set_num_threads(num_threads)


def test_a_thread_that_ends_leaves_no_memory_of_its_products(ops: Kernels) -> None:
    if not ops.has_splits:
        pytest.skip("this CPU has no AMX")
    a, b = random(300, 600), random(1024, 600, seed=1)

    def grown_by(num_threads: int) -> int:
        before = psutil.Process().memory_info().rss
        for _ in range(num_threads):
            thread = threading.Thread(target=ops.multiply_split, args=(a, b))
            thread.start()
            thread.join()
        return psutil.Process().memory_info().rss - before

    grown_by(5)
    assert grown_by(80) < 20_000_000  # each lays out two thirds of a megabyte


@pytest.mark.parametrize("scale", [1e-18, 1e-10, 1e10, 1e18])
def test_a_split_product_keeps_large_and_small_numbers(ops: Kernels, scale: float) -> None:
    if not ops.has_splits:
        pytest.skip("this CPU has no AMX")
    a, b = random(40, 64), random(48, 64, seed=1)
    torch.testing.assert_close(
        ops.multiply_split(a * scale, b / scale), a @ b.t(), rtol=1e-5, atol=1e-5
    )
    a[3, 7], a[5, 2] = torch.nan, torch.inf
    out = ops.multiply_split(a, b)
    assert not out[3].isfinite().any()
    assert not out[5].isfinite().any()
    assert out[:3].isfinite().all()
    assert out[6:].isfinite().all()


def test_tiles_leave_onednns_own_products_as_they_were(ops: Kernels) -> None:
    if not ops.has_tiles:
        pytest.skip("this processor has no tiles")
    weight, x = random(96, 64, dtype=torch.bfloat16), random(40, 64, seed=1, dtype=torch.bfloat16)
    tiles = ops.make_tiles(weight)
    before = x @ weight.T
    for num_rows in (1, 7, 40):
        ops.multiply_tiles(x[:num_rows], tiles, 96, None, is_swish=False)
        assert torch.equal(x @ weight.T, before)


@pytest.mark.skipif(not HAS_BFLOAT16, reason="this CPU does not support bfloat16 matmuls")
@pytest.mark.usefixtures("ops")
def test_a_rounded_head_reads_states_that_lie_apart(tiny_llama_dir: Path) -> None:
    model: Any = load_model(
        tiny_llama_dir, weights="bfloat16"
    ).model  # Any: transformers is untyped here
    head = head_of(model)
    states_NQE = random(5, 7, model.config.hidden_size)
    last_N1E = states_NQE[:, -1:]  # of prompts that are read together
    found, exact = head(last_N1E), last_N1E @ model.get_output_embeddings().weight.T
    assert found.shape == exact.shape
    for n in range(5):
        best = exact[n, 0].topk(8).indices
        torch.testing.assert_close(found[n, 0, best], exact[n, 0, best], atol=1e-5, rtol=1e-5)


def test_all_layers_in_one_call_are_the_same_numbers_as_part_by_part(
    ops: Kernels, tiny_llama_dir: Path
) -> None:
    if not ops.has_tiles:
        pytest.skip("this processor has no tiles")
    model = load_model(tiny_llama_dir, weights="bfloat16", keeps_plain=False).model
    logits = []
    for is_whole in (True, False):
        batch = CursorBatch(model, max_rows=4, max_width=64)
        decoder: Any = getattr(batch.family.forward, "__self__")  # noqa: B009  # the type tells of a plain function
        assert decoder._fused is not None
        if not is_whole:
            decoder._fused = None
        said = [batch.join([[5, 6, 7], [8, 9, 10, 11, 12]])]
        said += [batch.advance([20 + step, 40 + step]) for step in range(5)]
        batch.leave(0)
        said.append(batch.advance([60]))
        logits.append(torch.cat(said))
    assert torch.equal(*logits)


def test_without_a_compiler_there_are_none() -> None:
    code = "from worker.cpu.kernels.bindings import kernels; print(kernels())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "/nonexistent"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == "None"


@pytest.mark.parametrize("beta", [None, 0.5, 0.1])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_distil_is_the_objective(
    ops: Kernels, beta: float | None, ce_weight: float, scale: float
) -> None:
    student, teacher = random(9, 1003) * scale, random(9, 1003, seed=1) * scale
    targets = torch.arange(9) * 100
    divergence: DivergenceName = "forward_kl" if beta is None else "jsd"
    objective = TokenObjective(divergence=divergence, beta=beta or 0.5, ce_weight=ce_weight)
    exact = objective.loss_and_gradient(student.double(), teacher.double(), targets)
    is_agreed = student.argmax(-1) == teacher.argmax(-1)
    gradient = student.clone()
    found = ops.distil(gradient, teacher, targets, beta=beta, ce_weight=ce_weight, factor=0.25)
    expected = torch.stack((exact.loss_N, exact.kl_N, exact.ce_N, is_agreed.double()), dim=1)
    # float32 logits of some hundreds are right to 1e-5
    torch.testing.assert_close(found.double(), expected, atol=1e-6 * scale, rtol=1e-5)
    torch.testing.assert_close(
        gradient.double(), exact.gradient_NV / 4, atol=1e-7 * scale, rtol=1e-4
    )


def test_rows_of_a_distillation_that_are_no_numbers_stay_apart(ops: Kernels) -> None:
    student, teacher, targets = (
        random(3, 50),
        random(3, 50, seed=1),
        torch.zeros(3, dtype=torch.long),
    )
    student[1, 7] = float("nan")
    found = ops.distil(student, teacher, targets, beta=0.5, ce_weight=0.0, factor=1.0)
    assert found[:, 0].isnan().tolist() == [False, True, False]
    assert student.isnan().all(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(1, 300), (3, 7, 300), (2, 0, 300)])
@pytest.mark.parametrize("trains_weight", [True, False])
def test_a_norms_gradients_are_torchs(shape: tuple[int, ...], trains_weight: bool) -> None:
    results = []
    for is_llama_like in (True, False):
        module = LlamaRMSNorm(300)
        with torch.no_grad():
            module.weight.copy_(random(300, seed=2))
        module.requires_grad_(trains_weight)
        if is_llama_like:
            use_training_ops(module)
        x = random(*shape).requires_grad_()
        y = module(x)
        (y * random(*shape, seed=1)).sum().backward()
        results.append([y, x.grad, module.weight.grad])
    for ours, theirs in zip(*results, strict=True):
        # sums of 300 in another order
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_places", [1, 3])  # angles for all rows, or each row's own
def test_a_rotations_gradients_are_torchs(ops: Kernels, num_places: int) -> None:
    x, slope = random(3, 7, 4, 24), random(3, 7, 4, 24, seed=1)
    # halves that differ
    cos, sin = (
        random(num_places, 7, 24, seed=2),
        random(num_places, 7, 24, seed=3),
    )
    theirs = x.clone().requires_grad_()
    expected, _ = apply_rotary_pos_emb(theirs, theirs, cos, sin, unsqueeze_dim=2)
    (expected * slope).sum().backward()
    torch.testing.assert_close(ops.rotate(x, cos, sin), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        ops.rotate(slope, cos, sin, is_back=True), theirs.grad, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("scale", [1.0, 50.0])  # far out e^-x is 0 in float32
def test_a_gated_mlps_gradients_are_torchs(scale: float) -> None:
    config = LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=4)
    torch.manual_seed(0)
    plain = LlamaMLP(config)
    decoder = copy.deepcopy(plain)
    use_training_ops(decoder)
    results = []
    for module in (decoder, plain):
        x = (random(3, 5, 24) * scale).requires_grad_()
        y = module(x)
        (y * random(3, 5, 24, seed=1)).sum().backward()
        results.append([y, x.grad, *(each.grad for each in module.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * scale, rtol=1e-5)


def test_a_students_copy_computes_with_its_own_weights(tiny_llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    plain = copy.deepcopy(model)
    use_training_ops(model)
    twin, tokens = copy.deepcopy(model), torch.arange(24).view(2, 12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    # four layers on, rounding has added up
    torch.testing.assert_close(twin(tokens).logits, plain(tokens).logits, atol=1e-4, rtol=1e-4)
    assert not model(tokens).logits.any()
