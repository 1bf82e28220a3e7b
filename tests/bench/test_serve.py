"""What the serving bench makes of what callers saw."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from bench.cases import Entry
from bench.load import Answer, Load
from bench.serve import PROMPTS, figures, over, overhead_ms, summary


def loads(*rates: float, first: float = 100.0) -> Entry:
    callers = ("1", "8", "32")
    return {
        n: {"tokens_per_second": rate, "first_token_ms_p50": first}
        for n, rate in zip(callers, rates, strict=True)
    }


def test_ratios_are_against_the_better_float_of_a_peer_at_each_number_of_callers() -> None:
    contenders = {
        "ours": {"loads": loads(30.0, 150.0, 320.0, first=80.0)},
        "vllm-float32": {"loads": loads(20.0, 100.0, 160.0, first=200.0)},
        "vllm-bfloat16": {"loads": loads(25.0, 75.0, 150.0, first=160.0)},
    }
    found = figures(contenders, {"step_floor_ms": 20.0})
    assert found["ratio_vs_vllm_1"] == pytest.approx(1.2)
    assert found["ratio_vs_vllm_8"] == pytest.approx(1.5)
    assert found["ratio_vs_vllm_32"] == pytest.approx(2.0)
    assert found["first_token_ratio_vs_vllm_32"] == pytest.approx(0.5)
    assert found["ratio_vs_transformers_serve_32"] is None  # it was not measured
    # a step of 32 tokens takes 100 ms
    assert found["fraction_of_gemm_floor_32"] == pytest.approx(0.2)
    assert found["ratio_int8_vs_q8_0_1"] is None
    assert overhead_ms([{"overhead_ms_p50": ms} for ms in (8.0, 12.0, 9.0)]) == 9.0
    assert overhead_ms([]) is None  # our own service failed


def test_quantised_weights_are_compared_with_quantised_weights() -> None:
    contenders = {
        "ours": {"loads": loads(100.0, 500.0, 1000.0)},
        "ours-int8": {"loads": loads(180.0, 600.0, 1000.0)},
        "llama_cpp-float16": {"loads": loads(80.0, 250.0, 500.0)},
        "llama_cpp-q8_0": {"loads": loads(150.0, 300.0, 400.0)},
    }
    found = figures(contenders, {"step_floor_ms": 20.0})
    assert found["ratio_vs_llama_cpp_1"] == pytest.approx(1.25)
    assert found["ratio_int8_vs_q8_0_1"] == pytest.approx(1.2)


def test_tokens_are_counted_in_the_texts(tiny_llama_dir: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_llama_dir)
    texts = ("the student keeps the house", "the jar")
    answers = tuple(Answer("?", text, first_seconds=0.25, gaps=(0.5, 0.5)) for text in texts)
    found = summary(Load(answers, seconds=2.0), tokenizer)
    num_tokens = sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
    assert found["tokens_per_second"] == num_tokens / 2
    assert found["first_token_ms_p50"] == 250
    assert found["gap_ms_p95"] == 500


def test_turns_become_their_median() -> None:
    turns = [
        {"peak_bytes": n, "loads": loads(rate, rate, rate)}
        for n, rate in ((5, 1.0), (7, 3.0), (9, 2.0))
    ]
    found = over(turns)
    assert found["peak_bytes"] == 7
    assert found["loads"]["8"]["tokens_per_second"] == 2.0


def test_every_caller_of_the_largest_load_has_prompts_of_its_own() -> None:
    assert len(set(PROMPTS)) == len(PROMPTS) >= 64
