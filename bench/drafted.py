"""A model with and without a draft, in our engine without HTTP: `python -m bench.drafted TASK.json`."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from app.contracts.generation import Delta, Done, Failure, GenerateRequest, Message, Sampling
from app.contracts.messages import ArtifactRef
from bench.cases import Entry
from bench.process import versions
from worker.serve.engine import TransformersEngine
from worker.serve.loading import LoadedModel, load_model
from worker.serve.speculative import SpeculativeEngine

MAX_RUNNING, MAX_CONTEXT_TOKENS = 32, 1024
NO_WEIGHTS = ArtifactRef(key="none", bytes=0)


def engine_of(
    teacher: LoadedModel, draft: LoadedModel, num_draft_tokens: int
) -> TransformersEngine:
    """One that drafts with any number of callers; without draft tokens the plain engine."""
    if not num_draft_tokens:
        return TransformersEngine(
            teacher.model,
            teacher.tokenizer,
            max_running=MAX_RUNNING,
            max_context_tokens=MAX_CONTEXT_TOKENS,
        )
    return SpeculativeEngine(
        teacher.model,
        teacher.tokenizer,
        max_running=MAX_RUNNING,
        max_context_tokens=MAX_CONTEXT_TOKENS,
        draft=draft,
        num_draft_tokens=num_draft_tokens,
        max_drafting=MAX_RUNNING,
    )


def answers(engine: TransformersEngine, task: Entry, prompts: list[str], num_callers: int) -> Entry:
    """Each prompt's tokens, and how long all took together; a caller asks again when it is answered."""
    begun = time.perf_counter()
    asked: Iterator[tuple[int, str]] = enumerate(prompts)
    tokens: dict[str, list[int]] = {}
    num_done = num_tokens = 0
    while num_done < len(prompts):
        while len(tokens) - num_done < num_callers and (found := next(asked, None)) is not None:
            tokens[str(found[0])] = []
            engine.add(request(str(found[0]), found[1], task["max_tokens"]))
        for reply in engine.step():
            if isinstance(reply, Delta):
                tokens[reply.id] += reply.tokens
            elif isinstance(reply, Done):
                num_done, num_tokens = num_done + 1, num_tokens + reply.completion_tokens
            elif isinstance(reply, Failure):
                raise RuntimeError(reply.message)
    return {
        "seconds": time.perf_counter() - begun,
        "num_tokens": num_tokens,
        "tokens": list(tokens.values()),
    }


def request(name: str, prompt: str, max_tokens: int) -> GenerateRequest:
    return GenerateRequest(
        id=name,
        reply_to="bench",
        model="bench",
        weights=NO_WEIGHTS,
        messages=(Message(role="user", content=prompt),),
        sampling=Sampling(max_tokens=max_tokens, temperature=0.0),
        deadline_at=time.time() + 3600,
    )


def compare_texts(teacher: LoadedModel, draft: LoadedModel, task: Entry) -> Entry:
    """Answers with a draft against those without, and how near the two tokens were where they part."""
    expected = answers(engine_of(teacher, draft, 0), task, task["prompts"], task["text_callers"])[
        "tokens"
    ]
    found: Entry = {}
    for num_draft_tokens in task["num_draft_tokens"]:
        engine = engine_of(teacher, draft, num_draft_tokens)
        given = answers(engine, task, task["prompts"], task["text_callers"])["tokens"]
        pairs = zip(task["prompts"], expected, given, strict=True)
        parted = [parting(teacher, *pair) for pair in pairs if pair[1] != pair[2]]
        found[str(num_draft_tokens)] = {
            "num_prompts": len(given),
            "num_identical": len(given) - len(parted),
            "parted": parted,
            **counts(engine),
        }
        print(num_draft_tokens, found[str(num_draft_tokens)], flush=True)
    return found


def counts(engine: TransformersEngine) -> Entry:
    if not isinstance(engine, SpeculativeEngine):
        return {}
    of = engine.draft_counts
    return {
        "acceptance_rate": round(of.acceptance_rate, 4),
        "mean_accepted": round(of.mean_accepted, 3),
        "tokens_a_call": round(of.tokens_a_round, 3),
    }


def parting(teacher: LoadedModel, prompt: str, expected: list[int], given: list[int]) -> Entry:
    """Where two answers part, and the gap between the logits of the two tokens there (both of one plain pass)."""
    shared = next(
        (i for i, (a, b) in enumerate(zip(expected, given, strict=False)) if a != b), None
    )
    if shared is None:  # one of them ended
        return {"prompt": prompt, "at": min(len(expected), len(given)), "gap": None}
    chat = [{"role": "user", "content": prompt}]
    read = teacher.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    with torch.no_grad():
        logits_V = teacher.model(torch.tensor([[*read, *expected[:shared]]])).logits[0, -1]
    gap = float(logits_V[expected[shared]] - logits_V[given[shared]])
    return {"prompt": prompt, "at": shared, "gap": gap}


def compare_speed(teacher: LoadedModel, draft: LoadedModel, task: Entry) -> Entry:
    """Tokens a second of all contenders, which take turns; the second time in the other order."""
    totals: Entry = {}
    accepted: Entry = {}
    contenders = [0, *task["num_draft_tokens"]]
    for num_callers, num_prompts in task["loads"]:
        half = num_prompts // 2
        for turn, order in enumerate((contenders, contenders[::-1])):
            prompts = task["prompts"][turn * half : (turn + 1) * half]
            for num_draft_tokens in order:
                engine = engine_of(teacher, draft, num_draft_tokens)
                answers(engine, task, ["Hello"], 1)  # warms up
                made = answers(engine, task, prompts, num_callers)
                accepted.setdefault(str(num_callers), {})[str(num_draft_tokens)] = counts(engine)
                sums = totals.setdefault(str(num_callers), {}).setdefault(
                    str(num_draft_tokens), [0, 0.0]
                )
                sums[0] += made["num_tokens"]
                sums[1] += made["seconds"]
    found: Entry = {}
    for callers, by_draft in totals.items():
        rates = {k: num_tokens / seconds for k, (num_tokens, seconds) in by_draft.items()}
        found[callers] = {
            k: {
                "tokens_per_second": round(rate, 1),
                "speed_up": round(rate / rates["0"], 3),
                **accepted[callers][k],
            }
            for k, rate in rates.items()
        }
        print(callers, found[callers], flush=True)
    return found


def measure(task: Entry) -> Entry:
    torch.set_num_threads(task["num_threads"])
    weights = task["weights"]
    teacher, draft = (
        load_model(Path(task[name]), weights=weights, keeps_plain=weights == "plain")
        for name in ("teacher_dir", "draft_dir")
    )
    doing = {"texts": compare_texts, "speed": compare_speed}
    return {
        **{name: doing[name](teacher, draft, task) for name in task["do"]},
        "versions": versions(),
    }


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    Path(task["answer"]).write_text(json.dumps(measure(task)))


if __name__ == "__main__":
    main()
