"""What is measured: models, sizes and contenders. Nothing here needs torch."""

from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Any, Literal

Engine = Literal["ours", "trl", "plain"]
TeacherMode = Literal["live", "cached", "expected"]
Divergence = Literal["jsd", "forward_kl"]
Entry = dict[str, Any]  # Any: JSON between processes
MAX_NEW_TOKENS = 48  # of the answers in the quality run


@dataclass(frozen=True)
class Contender:
    """One way to make a step. `expected` keeps E_p[W] of each row instead of hidden states (forward KL, frozen head).

    Ours runs with the allocator settings that the supervisor gives its trainers, the others with glibc's own unless
    `keeps_memory` says so.
    """

    name: str
    engine: Engine
    divergence: Divergence
    teacher: TeacherMode
    trains_head: bool = True
    keeps_memory: bool = False


@dataclass(frozen=True)
class Sizes:
    """Of one batch. A decoder alone reads prompt and completion; with source_tokens an encoder reads those instead."""

    num_rows: int
    prompt_tokens: int
    completion_tokens: int
    source_tokens: int = 0


@dataclass(frozen=True)
class Case:
    """Contenders that are given the same models and batches. `models` names a pair that `bench.prepare` can make."""

    name: str
    models: str
    sizes: Sizes
    contenders: tuple[Contender, ...]
    num_warmup: int = 2
    num_timed: int = 6


def ours(
    divergence: Divergence, teacher: TeacherMode, *, trains_head: bool = True, name: str = ""
) -> Contender:
    short = {"jsd": "jsd", "forward_kl": "fkl"}[divergence]
    head = "" if trains_head else "-frozen"
    return Contender(name or f"{short}-{teacher}{head}", "ours", divergence, teacher, trains_head)


# By these names the figures are found below and in `bench.steps`. A reference counts with the faster of the two allocator settings.
KEEPS_MEMORY = "-keeps-memory"
REFERENCE = {"jsd": "reference-jsd", "forward_kl": "reference-fkl"}
RATIOS = {
    "ratio_cached_vs_trl": ("jsd-cached", "reference-jsd"),
    "ratio_live_vs_trl": ("jsd-live", "reference-jsd"),
    "ratio_fkl_cached_vs_trl": ("fkl-cached-frozen", "reference-fkl"),
    "ratio_fkl_live_vs_trl": ("fkl-live", "reference-fkl"),
}
FLOOR_OF = "jsd-cached"
MEMORY_OF = ("jsd-cached", "reference-jsd")

OURS = (
    ours("jsd", "cached"),
    ours("jsd", "live"),
    ours("forward_kl", "cached", trains_head=False),
    ours("forward_kl", "live"),
)
OURS_MORE = (
    ours("jsd", "cached", trains_head=False),
    ours("jsd", "live", trains_head=False),
    ours("forward_kl", "cached"),
    ours("forward_kl", "live", trains_head=False),
    ours("forward_kl", "expected", trains_head=False),
)


def references(engine: Engine) -> tuple[Contender, ...]:
    divergences: tuple[Divergence, ...] = ("jsd", "forward_kl")
    plain = tuple(Contender(REFERENCE[d], engine, d, "live") for d in divergences)
    return plain + tuple(replace(c, name=c.name + KEEPS_MEMORY, keeps_memory=True) for c in plain)


TRL_MORE = (Contender("reference-fkl-frozen", "trl", "forward_kl", "live", trains_head=False),)
CASES = {
    case.name: case
    for case in (
        Case(
            "smollm2",
            "smollm2-8",
            Sizes(8, 64, 64),
            (*references("trl"), *OURS, *OURS_MORE, *TRL_MORE),
        ),
        Case(
            "t5",
            "t5",
            Sizes(16, 0, 24, source_tokens=128),
            (*references("plain"), *OURS),
            num_timed=10,
        ),
        Case("vocab150k", "vocab150k", Sizes(8, 64, 64), (*references("trl"), *OURS), 1, 3),
        Case("tiny", "tiny", Sizes(2, 8, 8), (*references("plain"), *OURS, OURS_MORE[-1]), 1, 2),
    )
}


def quick(case: Case) -> Case:
    """The same sizes, but only what the ratios need, and few steps."""
    needed = {*(name for pair in RATIOS.values() for name in pair), FLOOR_OF, *MEMORY_OF}
    contenders = tuple(c for c in case.contenders if c.name.removesuffix(KEEPS_MEMORY) in needed)
    return replace(case, contenders=contenders, num_warmup=1, num_timed=2)


def batches_of(case: Case, *, num_tokens: int, start_id: int = 0) -> Entry:
    """Rows of random tokens (a step's cost does not depend on them) and which of them make each batch."""
    random, sizes = Random(0), case.sizes
    num_batches = case.num_warmup + case.num_timed

    def some(count: int) -> list[int]:
        return [random.randrange(3, num_tokens) for _ in range(count)]

    rows = []
    for _ in range(num_batches * sizes.num_rows):
        before = [start_id] if sizes.source_tokens else some(sizes.prompt_tokens)
        rows.append(
            {
                "source_ids": some(sizes.source_tokens),
                "token_ids": before + some(sizes.completion_tokens),
                "spans": [[len(before), len(before) + sizes.completion_tokens]],
            }
        )
    batches = [
        list(range(i * sizes.num_rows, (i + 1) * sizes.num_rows)) for i in range(num_batches)
    ]
    return {"rows": rows, "batches": batches, "sizes": asdict(sizes)}
