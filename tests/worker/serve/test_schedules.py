"""Random schedules of each family against `generate()` one at a time; `pytest --schedules 200` runs so many of each."""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from app.contracts import ArtifactRef, Delta, GenerateRequest, Reply, Sampling
from app.distillation import Lora
from tests.tiny import save_tiny
from worker.distill.lora import add_lora, lora_tensors, merged
from worker.distill.students import load_model as load_student
from worker.serve.engine import TransformersEngine, end_ids
from worker.serve.loading import LoadedModel, load_model

FAMILIES = ("gpt2", "llama", "mistral", "qwen3", "smollm3", "bloom", "opt", "gpt_neox", "t5", "bart",
            "encoder-decoder", "llama with LoRA")  # fmt: skip
ENCODER_DECODERS = ("t5", "bart", "encoder-decoder")
NUM_PROMPTS, LONGEST_PROMPT, LONGEST_ANSWER = 16, 40, 24
REQUESTS_A_SCHEDULE = 8


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
            sampling=Sampling(max_tokens=num_tokens, temperature=0.0 if seed is None else 0.8, seed=seed),
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
            tokens += [t for reply in engine.step() if isinstance(reply, Delta) for t in reply.tokens]
        return tokens

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
        for adapter in lora_tensors(student).values():
            torch.nn.init.normal_(adapter, 0.0, 0.1)
        with merged(student) as plain:
            plain.save_pretrained(folder)
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
        expected = {asked.id: (asked, subject.written(prompt, seed)) for asked, prompt, seed in arrivals}
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
        for name, (asked, tokens) in expected.items():
            cut = tokens[: asked.sampling.max_tokens]
            assert found[name] == [token for token in cut if token not in ends], (number, name)
