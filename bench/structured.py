"""Compares decoding with and without a JSON Schema, and measures the steps of another stream.

`python -m bench.structured FOLDER` serves the model in FOLDER in this process. It needs a quiet
machine. Both sides run alternately, with the same prompts and the same number of tokens.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from app.contracts.generation import Failure, GenerateRequest, Grammar, Sampling
from app.contracts.messages import ArtifactRef
from worker.serve.engine import TransformersEngine
from worker.serve.loading import load_model

NUM_CALLERS: Final = 8
NUM_TOKENS: Final = 96
SCHEMA: Final = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 40, "maxLength": 80},
        "parts": {
            "type": "array",
            "minItems": 20,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "minLength": 20, "maxLength": 40},
                    "kind": {"enum": ["lamp", "jar", "still"]},
                    "size": {"type": "integer"},
                },
                "required": ["name", "kind", "size"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["title", "parts"],
    "additionalProperties": False,
}
PLAIN: Final = Grammar(kind="json_schema", text=json.dumps(SCHEMA))
HOSTILE: Final = (
    Grammar(kind="regex", text="(.*a.{20}){20}"),
    Grammar(kind="regex", text=r"(\p{L}{1,300}\p{N}{1,300}){1,300}"),
    Grammar(
        kind="json_schema",
        text=json.dumps({"type": "object", "properties": {f"p{i}": {} for i in range(500)}}),
    ),
    Grammar(kind="json_schema", text=json.dumps({"type": "integer", "multipleOf": 9973})),
)


def request_of(name: str, grammar: Grammar | None, num_tokens: int) -> GenerateRequest:
    """Returns a sampled request. Without a grammar, its answer does not end early."""
    sampling = Sampling(
        max_tokens=num_tokens, temperature=1.0, seed=1, grammar=grammar, ignore_eos=grammar is None
    )
    return GenerateRequest(
        id=name,
        reply_to="",
        model="bench",
        weights=ArtifactRef(key="bench", bytes=1),
        text=f"Describe lantern number {name} as JSON:",
        sampling=sampling,
        deadline_at=time.time() + 600,
    )


def tokens_per_second(engine: TransformersEngine, grammar: Grammar | None) -> float:
    """Returns the decode speed of NUM_CALLERS requests together, without their prefill."""
    for number in range(NUM_CALLERS):
        engine.add(request_of(str(number), grammar, NUM_TOKENS))
    while engine.num_waiting:
        engine.step()
    began, num_tokens = time.perf_counter(), 0
    while engine.has_work():
        num_tokens += engine.num_running
        failures = [reply for reply in engine.step() if isinstance(reply, Failure)]
        assert not failures, failures
    return num_tokens / (time.perf_counter() - began)


def longest_steps_ms(
    engine: TransformersEngine, grammars: Sequence[Grammar | None]
) -> tuple[float, float]:
    """Returns the longest steps of a stream beside requests with these grammars.

    The first is over all steps, the second over those without a prefill. The grammars are compiled
    before, as the threads that tokenise prompts do.
    """
    others = [request_of(f"h{number}", g, 64) for number, g in enumerate(grammars)]
    prompts = [engine.prompt_of(other) for other in others]
    engine.add(request_of("stream", None, 128))
    for _ in range(16):
        engine.step()
    for other, prompt in zip(others, prompts, strict=True):
        engine.add(other, prompt)
    prefills: list[float] = []
    decodes: list[float] = []
    while engine.has_work():
        is_prefill, began = engine.num_waiting > 0, time.perf_counter()
        engine.step()
        (prefills if is_prefill else decodes).append(time.perf_counter() - began)
    return 1000 * max(prefills + decodes), 1000 * max(decodes)


def main() -> None:
    """Prints both speeds, their ratio, and the longest steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--weights", choices=("plain", "bf16", "int8"), default="plain")
    options = parser.parse_args()
    loaded = load_model(options.folder, weights=options.weights, keeps_plain=False)
    engine = TransformersEngine(
        loaded.model, loaded.tokenizer, max_running=16, max_context_tokens=512
    )
    for grammar in (None, PLAIN):
        tokens_per_second(engine, grammar)  # warm-up
    free, bound = [], []
    for _ in range(options.rounds):
        free.append(tokens_per_second(engine, None))
        bound.append(tokens_per_second(engine, PLAIN))
    ratios = [b / f for b, f in zip(bound, free, strict=True)]
    result: dict[str, float] = {
        "tokens_per_second": round(statistics.median(free), 1),
        "with_schema": round(statistics.median(bound), 1),
        "ratio": round(statistics.median(ratios), 3),
    }
    for name, grammars in (("plain", [None] * len(HOSTILE)), ("hostile", HOSTILE)):
        steps = [longest_steps_ms(engine, grammars) for _ in range(options.rounds)]
        for column, kind in enumerate(("", "_without_prefill")):
            longest = max(step[column] for step in steps)
            result[f"longest_step_ms_beside_{name}{kind}"] = round(longest, 1)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
