"""Teacher, untrained student and distilled student side by side: the public result of a job."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from worker.distill.answers import AnswerFile, Asking, ask
from worker.distill.data import Example, Row
from worker.distill.evaluate import NUM_ANSWERED, Speed, measure_speed, rouge_l, size_of
from worker.distill.sampler import Sampler
from worker.distill.spec import RunSpec
from worker.distill.students import StudentRecipe, load_model
from worker.gemm import pack_weights

Entry = dict[str, Any]  # Any: open-ended JSON
MAX_SAMPLE_CHARACTERS = 2000


@dataclass(frozen=True)
class Judge:
    """Judges three models by the same rows and prompts, one after the other, so that one is in memory at a time.

    `measure` gives a model's held-out series; `on_progress` takes the share that is done and may raise to stop.
    """

    spec: RunSpec
    valid: Sequence[Example]
    valid_rows: Sequence[Row]
    tokenizer: PreTrainedTokenizerBase
    device: str
    sampler_for: Callable[[PreTrainedModel], Sampler]
    measure: Callable[[PreTrainedModel], dict[str, float]]
    on_progress: Callable[[float], None]

    def report(self, recipe: StudentRecipe, best_dir: Path, answers: AnswerFile) -> Entry:
        """The result's `teacher`, `untrained`, `student`, `compression` and `samples`."""
        builders: dict[str, Callable[[], PreTrainedModel]] = {
            "teacher": lambda: load_model(self.spec.teacher_dir),
            "untrained": recipe.build,
            "student": lambda: load_model(best_dir),
        }
        entries: dict[str, Entry] = {}
        texts: dict[str, list[str]] = {}
        for number, (name, build) in enumerate(builders.items()):
            model = build().to(self.device).requires_grad_(False)
            pack_weights(model)
            entries[name] = self._held_out(model) | size_of(model)
            self.on_progress((number + 0.3) / 3)
            file = answers if name == "teacher" else None
            texts[name] = self._texts(model, file, begun=(number + 0.3) / 3, width=0.5 / 3)
            if "rouge_l" in self.metrics and texts[name]:
                entries[name]["rouge_l"] = rouge_l(texts[name], texts["teacher"])
            if "speed" in self.metrics:
                entries[name] |= _speed_fields(measure_speed(self.sampler_for(model), self._prompts()))
            self.on_progress((number + 1) / 3)
            del model
            gc.collect()
        return {**entries, "compression": _compression(entries), "samples": self._samples(texts)}

    @property
    def metrics(self) -> tuple[str, ...]:
        return self.spec.distillation.evaluation.metrics

    def _held_out(self, model: PreTrainedModel) -> Entry:
        series = {name.removeprefix("valid_"): value for name, value in self.measure(model).items()}
        return {
            name: value for name, value in series.items() if name in ("loss", "kl") or name in self.metrics
        }

    def _numbers(self) -> list[int]:
        """Which held-out rows are answered: the first ones that ask different things."""
        asked: dict[tuple[int, ...], int] = {}
        for i, example in enumerate(self.valid):
            asked.setdefault(prompt_of(example), i)
        return list(asked.values())[:NUM_ANSWERED]

    def _prompts(self) -> list[tuple[int, ...]]:
        return [prompt_of(self.valid[i]) for i in self._numbers()]

    def _texts(
        self, model: PreTrainedModel, file: AnswerFile | None, *, begun: float, width: float
    ) -> list[str]:
        """Greedy answers to the prompts; the teacher's are kept on file."""
        if "rouge_l" not in self.metrics and not self.spec.distillation.evaluation.num_samples:
            return []
        limit = max(len(prompt) for prompt in self._prompts()) + self.spec.distillation.data.max_new_tokens
        how = Asking(
            max_new_tokens=self.spec.distillation.data.max_new_tokens,
            max_sequence_tokens=min(limit, int(model.config.max_position_embeddings)),
            temperature=0.0,
        )

        def tell(num_done: int, num_wanted: int, _: int) -> None:
            self.on_progress(begun + width * num_done / num_wanted)

        made = ask(self._prompts(), how, file or AnswerFile(None), lambda: self.sampler_for(model), tell)
        return [str(self.tokenizer.decode(answer.tokens, skip_special_tokens=True)) for answer in made]

    def _samples(self, texts: dict[str, list[str]]) -> list[Entry]:
        num_samples = self.spec.distillation.evaluation.num_samples
        samples = []
        for place, i in enumerate(self._numbers()[:num_samples]):
            row = self.valid_rows[i]
            prompt = row.text if row.text is not None else row.question.messages[-1]["content"]
            answers = {name: answers[place][:MAX_SAMPLE_CHARACTERS] for name, answers in texts.items()}
            samples.append({"prompt": prompt[:MAX_SAMPLE_CHARACTERS], **answers})
        return samples


def prompt_of(example: Example) -> tuple[int, ...]:
    """What a model is given to go on from: of plain text, which asks nothing, the first half."""
    prompt = example.prompt_ids
    return prompt if len(prompt) > 1 else example.token_ids[: max(1, len(example.token_ids) // 2)]


def _speed_fields(speed: Speed) -> Entry:
    return {
        "tokens_per_second": round(speed.alone, 2),
        "tokens_per_second_batched": round(speed.batched, 2),
        "num_batched": speed.num_batched,
    }


def _compression(entries: dict[str, Entry]) -> Entry:
    teacher, student = entries["teacher"], entries["student"]
    fields = {
        "parameters": teacher["num_parameters"] / student["num_parameters"],
        "weights_bytes": teacher["weights_bytes"] / student["weights_bytes"],
        "layers": teacher["num_layers"] / student["num_layers"],
    }
    for name, field in (("speedup", "tokens_per_second"), ("speedup_batched", "tokens_per_second_batched")):
        if field in teacher:
            fields[name] = student[field] / teacher[field]
    return {name: round(value, 3) for name, value in fields.items()}
