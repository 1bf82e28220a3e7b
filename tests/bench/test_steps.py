"""Each contender makes the same step: checked on tiny random models, without TRL."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
import torch

from bench import floor, ours, plain, prepare
from bench.cases import CASES, RATIOS, Contender, Entry, batches_of, quick
from bench.steps import figures, losses_differ

TINY = CASES["tiny"]


@pytest.fixture(autouse=True)
def torch_settings() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Entry:
    work = tmp_path_factory.mktemp("bench")
    models = prepare.prepare({"work": str(work), "models": "tiny", "num_threads": 1})
    data = batches_of(TINY, num_tokens=models["num_tokens"])
    (work / "rows.json").write_text(json.dumps(data))
    return {
        **models,
        "work": str(work),
        "num_threads": 1,
        "rows_path": str(work / "rows.json"),
        "batches": data["batches"],
        "batch_tokens": 32,
        "learning_rate": 1e-3,
        "cache_dir": str(work / "cache"),
        "seed": 0,
    }


def step(task: Entry, contender: Contender) -> Entry:
    does = {"ours": ours.time_steps, "plain": plain.time_steps}[contender.engine]
    return does({**task, "contender": asdict(contender)})


@pytest.mark.parametrize(
    "contender", [c for c in TINY.contenders if c.engine == "ours"], ids=lambda c: c.name
)
def test_our_first_loss_is_that_of_the_plain_step(task: Entry, contender: Contender) -> None:
    expected = step(task, replace(contender, engine="plain"))
    found = step(task, contender)
    assert found["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-4)
    assert len(found["seconds"]) == TINY.num_warmup + TINY.num_timed
    assert found["peak_bytes"] > 0


def test_the_floor_counts_the_products_that_a_step_needs(
    task: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floor, "MEASURED_SECONDS", 0.0)
    contenders = [asdict(c) for c in TINY.contenders if c.engine == "ours"]
    gflop = floor.floors({**task, "contenders": contenders})["contenders"]
    # 2 layers of 4 attention and 3 gated matrices, 2 rows of 15 tokens, 16 loss rows
    body = 3 * 2 * 30 * 2 * (4 * 32 * 32 + 3 * 32 * 64)
    head = 2 * 16 * 32 * 320
    assert gflop["jsd-cached"]["flop"] == body + 4 * head
    assert gflop["fkl-cached-frozen"]["flop"] == body + 3 * head
    assert gflop["fkl-expected-frozen"]["flop"] == body + 2 * head
    assert gflop["jsd-live"]["flop"] == body + 4 * head + body * 2 // 3
    assert all(c["seconds"] > 0 for c in gflop.values())


def test_ratios_are_medians_over_the_turns_and_missing_ones_are_none() -> None:
    def turn(ours_ms: float, theirs_ms: float) -> Entry:
        return {
            "jsd-cached": {"ms": ours_ms, "peak_bytes": 1},
            "reference-jsd": {"ms": theirs_ms, "peak_bytes": 2},
        }

    turns = [turn(1.0, 4.0), turn(1.0, 6.0), turn(2.0, 10.0)]
    found = figures(turns, {name: {} for name in turns[0]})
    assert found["ratio_cached_vs_trl"] == 5.0
    assert found["peak_memory_ratio_vs_trl"] == 0.5
    assert found["ratio_fkl_live_vs_trl"] is None


def test_a_reference_counts_with_its_faster_allocator_settings() -> None:
    turn = {
        "jsd-cached": {"ms": 1.0, "peak_bytes": 1},
        "reference-jsd": {"ms": 6.0, "peak_bytes": 2},
        "reference-jsd-keeps-memory": {"ms": 3.0, "peak_bytes": 4},
    }
    found = figures([turn], {name: {} for name in turn})
    assert found["ratio_cached_vs_trl"] == 3.0
    assert found["peak_memory_ratio_vs_trl"] == 0.5


def test_a_contender_with_another_loss_is_found() -> None:
    losses = {"a": 1.0, "b": 1.0001, "c": 1.2}
    contenders = {n: {"divergence": "jsd", "first_loss": loss} for n, loss in losses.items()}
    assert losses_differ(contenders) == ["c"]


@pytest.mark.parametrize("name", CASES)
def test_a_quick_case_still_has_what_the_ratios_need(name: str) -> None:
    assert {n for pair in RATIOS.values() for n in pair} <= {
        c.name for c in quick(CASES[name]).contenders
    }
