"""Compares decoding with and without a JSON Schema, and measures the gaps of another stream.

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

from app.contracts.generation import Delta, Failure, GenerateRequest, Grammar, Sampling
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


def largest_gap_ms(engine: TransformersEngine, grammars: Sequence[Grammar | None]) -> float:
    """Returns the largest time between two tokens of a stream beside requests with these grammars.

    The grammars are compiled before, as the threads that tokenise prompts do.
    """
    others = [request_of(f"h{number}", g, 64) for number, g in enumerate(grammars)]
    prompts = [engine.prompt_of(other) for other in others]
    engine.add(request_of("stream", None, 128))
    gaps, last = [], None
    for step in range(10_000):
        if step == 16:
            for other, prompt in zip(others, prompts, strict=True):
                engine.add(other, prompt)
        replies = engine.step()
        if any(isinstance(reply, Delta) and reply.id == "stream" for reply in replies):
            now = time.perf_counter()
            if last is not None:
                gaps.append(now - last)
            last = now
        if not engine.has_work():
            break
    return 1000 * max(gaps)


def main() -> None:
    """Prints both speeds, their ratio, and the gaps of a stream."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    loaded = load_model(options.folder, keeps_plain=False)
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
    result = {
        "tokens_per_second": round(statistics.median(free), 1),
        "with_schema": round(statistics.median(bound), 1),
        "ratio": round(statistics.median(ratios), 3),
        "largest_gap_ms_beside_plain": round(largest_gap_ms(engine, [None] * len(HOSTILE)), 1),
        "largest_gap_ms_beside_hostile": round(largest_gap_ms(engine, HOSTILE), 1),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
