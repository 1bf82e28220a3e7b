"""Random schedules of each family against `generate()` one at a time; `pytest --schedules 200` runs so many of each.

An answer may part only where the choice hangs on rounding: batches of other sizes sum in another order. In float64 the two
tokens' logits must then be within LOGIT_GAP, or the drawn number within SHARE_GAP of the border between the two.
"""

import copy
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from app.contracts.architectures import distilled
from app.contracts.distillation import Lora
from app.contracts.generation import Delta, GenerateRequest, Reply, Sampling
from app.contracts.messages import ArtifactRef
from tests.adapters import save_adapted
from tests.tiny import save_tiny
from worker.distill.students.lora import add_lora, lora_tensors
from worker.distill.students.recipe import load_model as load_student
from worker.models.adapters import merge_adapters
from worker.serve.decoding.families import family_of
from worker.serve.decoding.sampling import seeded_generator
from worker.serve.engine import TransformersEngine, end_ids
from worker.serve.loading import LoadedModel, load_model

ENCODER_DECODERS = distilled("seq2seq")
FAMILIES = (*distilled("causal"), *ENCODER_DECODERS, "llama with LoRA")
NUM_PROMPTS, LONGEST_PROMPT, LONGEST_ANSWER = 16, 40, 24
REQUESTS_A_SCHEDULE = 8
TEMPERATURE = 0.8
LOGIT_GAP, SHARE_GAP = 1e-4, 1e-5  # float32 logits of these models are right to about 1e-5


@dataclass
class Subject:
    """A model as it is served, without plain weights, and what it is to write: found by other means, once."""

    folder: Path
    has_encoder: bool
    _written: dict[tuple[int, int | None], list[int]] = field(default_factory=dict)

    @cached_property
    def served(self) -> LoadedModel:
        return load_model(self.folder, keeps_plain=False)

    @cached_property
    def plain(self) -> Any:  # Any: transformers is untyped here
        auto = AutoModelForSeq2SeqLM if self.has_encoder else AutoModelForCausalLM
        return auto.from_pretrained(self.folder, dtype=torch.float32).eval()

    @cached_property
    def prompts(self) -> list[tuple[int, ...]]:
        rng = random.Random(0)
        beginning = [rng.randrange(5, 150) for _ in range(LONGEST_PROMPT // 2)]
        lengths = [rng.randint(1, LONGEST_PROMPT) for _ in range(NUM_PROMPTS)]
        shared = [rng.choice(([], beginning))[: length - 1] for length in lengths]
        return [
            (*begin, *(rng.randrange(5, 150) for _ in range(length - len(begin))))
            for begin, length in zip(shared, lengths, strict=True)
        ]

    def request(self, name: str, prompt: int, seed: int | None, num_tokens: int) -> GenerateRequest:
        return GenerateRequest(
            id=name,
            reply_to="api",
            model="tiny",
            weights=ArtifactRef(key="models/tiny", bytes=1000),
            tokens=self.prompts[prompt],
            sampling=Sampling(
                max_tokens=num_tokens, temperature=0.0 if seed is None else TEMPERATURE, seed=seed
            ),
            deadline_at=time.time() + 600,
        )

    def written(self, prompt: int, seed: int | None) -> list[int]:
        """Greedy: by `generate()`; with a seed: by an engine that has nothing else to do."""
        if (prompt, seed) not in self._written:
            self._written[prompt, seed] = (
                self._generated(prompt) if seed is None else self._alone(prompt, seed)
            )
        return self._written[prompt, seed]

    def _generated(self, prompt: int) -> list[int]:
        inputs = torch.tensor([self.prompts[prompt]])
        with torch.no_grad():
            output = self.plain.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=LONGEST_ANSWER,
                do_sample=False,
            )
        tokens: list[int] = output[0, 1 if self.has_encoder else inputs.shape[1] :].tolist()
        return tokens

    def _alone(self, prompt: int, seed: int) -> list[int]:
        engine = self.engine(1)
        engine.add(self.request("alone", prompt, seed, LONGEST_ANSWER))
        tokens: list[int] = []
        while engine.has_work():
            tokens += [
                t for reply in engine.step() if isinstance(reply, Delta) for t in reply.tokens
            ]
        return tokens

    def gap(
        self, prompt: int, seed: int | None, before: list[int], tokens: tuple[int, int]
    ) -> tuple[float, float]:
        """How far one of two tokens was from being chosen instead of the other, in float64, and how far it may be."""
        ids = torch.tensor([self.prompts[prompt]])
        model = copy.deepcopy(self.plain).double()
        with torch.no_grad():
            if self.has_encoder:
                start = family_of(model).start_token
                logits_V = model(
                    input_ids=ids, decoder_input_ids=torch.tensor([[start, *before]])
                ).logits[0, -1]
            else:
                logits_V = model(input_ids=torch.tensor([[*self.prompts[prompt], *before]])).logits[
                    0, -1
                ]
        if seed is None:
            return abs(float(logits_V[tokens[0]] - logits_V[tokens[1]])), LOGIT_GAP
        generator = seeded_generator(seed)
        *_, drawn = (
            float(torch.rand((), generator=generator, dtype=torch.float64)) for _ in (*before, None)
        )
        share_V = torch.softmax(logits_V / TEMPERATURE, dim=0)
        ends_V = share_V.cumsum(dim=0)
        outside = [
            max(float(ends_V[t] - share_V[t]) - drawn, drawn - float(ends_V[t]), 0.0)
            for t in tokens
        ]
        return max(outside), SHARE_GAP

    def engine(self, max_running: int) -> TransformersEngine:
        served = self.served
        return TransformersEngine(
            served.model, served.tokenizer, max_running=max_running, max_context_tokens=128
        )


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    family: str = request.param
    folder = save_tiny(tmp_path_factory.mktemp("tiny") / "model", family.removesuffix(" with LoRA"))
    if family.endswith("LoRA"):
        student = load_student(folder)
        add_lora(student, Lora(rank=4), seed=0)
        generator = torch.Generator().manual_seed(0)
        for adapter in lora_tensors(student).values():
            torch.nn.init.normal_(adapter, 0.0, 0.1, generator=generator)
        adapted = save_adapted(student, tmp_path_factory.mktemp("lora") / "saved", Lora(rank=4))
        AutoTokenizer.from_pretrained(folder).save_pretrained(adapted)
        folder = merge_adapters(folder, adapted, adapted.with_name("model"))
    return Subject(folder, family in ENCODER_DECODERS)


def schedule(subject: Subject, number: int) -> Iterator[tuple[GenerateRequest, int, int | None]]:
    """Requests in the order of their arrival, a third of them sampled."""
    rng = random.Random(number)
    for index in range(REQUESTS_A_SCHEDULE):
        prompt, seed = rng.randrange(NUM_PROMPTS), rng.choice((None, None, 7))
        yield (
            subject.request(f"r{index}", prompt, seed, rng.randint(1, LONGEST_ANSWER)),
            prompt,
            seed,
        )


@pytest.mark.usefixtures("small_first_buffers")
def test_every_schedule_gives_the_tokens_of_one_at_a_time(
    subject: Subject, pytestconfig: pytest.Config
) -> None:
    for number in range(pytestconfig.getoption("--schedules")):
        rng = random.Random(-number)
        engine, arrivals = subject.engine(rng.randint(2, 5)), list(schedule(subject, number))
        expected = {asked.id: (asked, prompt, seed) for asked, prompt, seed in arrivals}
        found: dict[str, list[int]] = {asked.id: [] for asked, _, _ in arrivals}
        replies: list[Reply] = []
        while arrivals or engine.has_work():
            if arrivals and rng.random() < 0.3:
                engine.add(arrivals.pop(0)[0])
            if rng.random() < 0.1:
                engine.add(subject.request("leaver", 0, None, LONGEST_ANSWER))
                replies += engine.step()
                engine.abort("leaver")
            replies += engine.step()
        for reply in replies:
            if isinstance(reply, Delta) and reply.id != "leaver":
                found[reply.id] += reply.tokens
        ends = end_ids(subject.served.model, subject.served.tokenizer)
        for name, (asked, prompt, seed) in expected.items():
            cut = subject.written(prompt, seed)[: asked.sampling.max_tokens]
            wanted = [token for token in cut if token not in ends]
            at = next(
                (
                    i
                    for i, pair in enumerate(zip(found[name], wanted, strict=False))
                    if pair[0] != pair[1]
                ),
                None,
            )
            if at is None:
                assert found[name] == wanted, (number, name)
            else:
                gap, allowed = subject.gap(prompt, seed, wanted[:at], (found[name][at], wanted[at]))
                assert gap < allowed, (number, name, at, found[name], wanted)
