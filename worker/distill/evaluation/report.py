"""The public result of a job: compares teacher, untrained student, baseline and student."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app.contracts.run_limits import (
    NUM_ANSWERED,
    NUM_CLASSIFIED,
    NUM_TIMED,
    TOKENS_BEYOND_A_LABEL,
)
from worker.cpu import prepare_for_inference
from worker.distill.data.answer_cache import AnswerFile, AnswerSampling, ask
from worker.distill.data.chat_rows import answer_text
from worker.distill.data.rows import Example, Row
from worker.distill.data.sampler import Generation, Sampler
from worker.distill.data.split import groups_of
from worker.distill.evaluation.bootstrap import mean
from worker.distill.evaluation.held_out import (
    HeldOut,
    Speed,
    measure_speed,
    size_of,
)
from worker.distill.evaluation.label_metrics import Labels, find_labels, read_labels
from worker.distill.evaluation.metrics import (
    ANSWER_METRICS,
    Entry,
    Figures,
    answer_figures,
    difference,
    held_out_figures,
    with_intervals,
)
from worker.distill.students.recipe import StudentRecipe, load_model
from worker.models.architectures import context_tokens, kind_of
from worker.protocol.run_spec import RunSpec

MAX_SAMPLE_CHARACTERS = 2000
# Public names of the compared models of a run without a teacher.
MODELS_WITHOUT_TEACHER = {"untrained": "before", "student": "after"}

Build = Callable[[], PreTrainedModel]
Tell = Callable[[float], None]


@dataclass(frozen=True)
class View:
    """The held-out rows as one kind of model reads them, and a function that measures models."""

    examples: Sequence[Example]
    tokenizer: PreTrainedTokenizerBase
    measure: Callable[[PreTrainedModel], HeldOut]


@dataclass(frozen=True)
class JudgedTeacher:
    """The held-out rows as the teacher reads them, and a function that loads the teacher.

    It is loaded on the device and in the dtype of the run's placement.
    """

    view: View
    load: Build


@dataclass(frozen=True)
class Evaluated:
    """Evaluation of a model: its public entry, figures, and answers if any were generated."""

    entry: Entry
    figures: Figures
    texts: list[str] | None


@dataclass
class Evaluator:
    """Evaluates models on the same rows and prompts, one at a time to save memory.

    The teacher, if there is one, is evaluated once per evaluator. `on_progress` receives the share
    that is done, and may raise to stop. `warn` writes an event.
    """

    spec: RunSpec
    student_view: View
    teacher: JudgedTeacher | None
    valid_rows: Sequence[Row]
    device: str
    sampler_for: Callable[[PreTrainedModel], Sampler]
    on_progress: Tell
    warn: Callable[[str], None]
    # of linear layers other than the head, on a CPU: for the losses, and for answers and speeds
    matmul_dtype: torch.dtype = torch.float32
    decoding_dtype: torch.dtype = torch.float32
    student_dtype: torch.dtype = torch.float32  # of the weights: the dtype in which they are saved
    _judged_teacher: Evaluated | None = field(default=None, init=False)
    _folders: dict[Path, Evaluated] = field(default_factory=dict, init=False)

    def report(
        self,
        recipe: StudentRecipe,
        best_dir: Path,
        answers: AnswerFile,
        baseline_dir: Path | None = None,
    ) -> Entry:
        """Returns an entry per model, `differences`, `compression` and `samples`.

        `differences` are the student's figures minus those of the untrained student and the
        baseline. `answers` is the file of the teacher's answers. `baseline_dir` holds the same
        student trained on the text alone. Without a teacher there is no `compression`.
        """
        students: dict[str, Path | None] = {"untrained": None}
        if baseline_dir is not None:
            students["ce_baseline"] = baseline_dir
        students["student"] = best_dir
        num_models = (self.teacher is not None) + len(students)
        judged: dict[str, Evaluated] = {}
        teacher = self._evaluate_teacher(self._tell_of(0, num_models), answers)
        if teacher is not None:
            judged["teacher"] = teacher
        for number, (name, folder) in enumerate(students.items(), start=len(judged)):
            tell = self._tell_of(number, num_models)
            judged[name] = (
                self._evaluate(lambda: recipe.build().to(self.student_dtype).to(self.device), tell)
                if folder is None
                else self._evaluate_folder(folder, tell)
            )
        entries = {name: model.entry for name, model in judged.items()}
        return {
            **entries,
            "differences": {
                name: difference(judged["student"].figures, judged[name].figures)
                for name in students
                if name != "student"
            },
            **({"compression": _compression(entries)} if teacher is not None else {}),
            "num_judged_questions": max(self.groups) + 1,
            "samples": self._samples(
                {name: model.texts for name, model in judged.items() if model.texts}
            ),
        }

    def entry(self, best_dir: Path, answers: AnswerFile) -> Entry:
        """Returns a student's own entry. The evaluations of it and the teacher are kept."""
        self._evaluate_teacher(self._tell_of(0, 2), answers)
        return self._evaluate_folder(best_dir, self._tell_of(1, 2)).entry

    def entries(self, best_dir: Path) -> Entry:
        """Returns the entries that exist so far, for a report that failed."""
        judged = {"teacher": self._judged_teacher, "student": self._folders.get(best_dir)}
        return {name: model.entry for name, model in judged.items() if model is not None}

    @cached_property
    def metrics(self) -> frozenset[str]:
        """The requested metrics, and that of the gate."""
        evaluation = self.spec.distillation.evaluation
        return frozenset(
            (*evaluation.metrics, *([evaluation.gate.metric] if evaluation.gate else []))
        )

    @cached_property
    def labels(self) -> Labels | None:
        """The labels of the held-out rows, or None if the targets are not labels.

        If accuracy or macro-F1 is requested, many or long labels are accepted too.
        """
        if not self.metrics & ANSWER_METRICS:
            return None
        references = [text for row in self.valid_rows if (text := reference_of(row)) is not None]
        encode = self.student_view.tokenizer.encode
        lengths = [len(encode(text, add_special_tokens=False)) for text in references]
        if not self.metrics & {"accuracy", "macro_f1"}:
            return find_labels(references, lengths)
        labels = read_labels(references, lengths)
        if labels is None:
            why = "are not class labels, since few repeat" if references else "are not in the file"
            self.warn(f"accuracy and macro_f1 are left out: the targets of the held-out rows {why}")
        return labels

    @cached_property
    def groups(self) -> list[int]:
        """The group of each held-out row.

        Rows that share a question are one group, which the bootstrap draws as a whole.
        """
        groups = groups_of(self.valid_rows)
        if len(groups) > 1 and max(groups) == 0:
            self.warn(
                "all evaluated rows have the same question, so the confidence intervals have zero width"
            )
        return groups

    @cached_property
    def numbers(self) -> list[int]:
        """The held-out rows that are answered: the first ones with distinct prompts."""
        rows_by_prompt: dict[tuple[int, ...], int] = {}
        for i, example in enumerate(self.student_view.examples):
            rows_by_prompt.setdefault(prompt_of(example), i)
        if not self.metrics & ANSWER_METRICS:
            num_samples = self.spec.distillation.evaluation.num_samples
            return list(rows_by_prompt.values())[: max(num_samples, NUM_TIMED)]
        return list(rows_by_prompt.values())[: NUM_CLASSIFIED if self.labels else NUM_ANSWERED]

    def _tell_of(self, number: int, num_models: int) -> Tell:
        return lambda share: self.on_progress((number + share) / num_models)

    def _evaluate_teacher(self, tell: Tell, answers: AnswerFile) -> Evaluated | None:
        if self._judged_teacher is None and self.teacher is not None:
            self._judged_teacher = self._evaluate(
                self.teacher.load, tell, self.teacher.view, answers
            )
        return self._judged_teacher

    def _evaluate_folder(self, folder: Path, tell: Tell) -> Evaluated:
        if folder not in self._folders:
            self._folders[folder] = self._evaluate(
                lambda: load_model(folder, self.student_dtype).to(self.device), tell
            )
        tell(1.0)
        return self._folders[folder]

    def _evaluate(
        self,
        build: Build,
        tell: Tell,
        teachers_view: View | None = None,
        teachers_file: AnswerFile | None = None,
    ) -> Evaluated:
        """Evaluates a model. Only the teacher has a view of its own and a file of answers."""
        is_teacher = teachers_view is not None
        view = teachers_view or self.student_view
        model = build().requires_grad_(False)
        head = model.get_output_embeddings()
        prepare_for_inference(model, dtype=self.matmul_dtype, exact=head)  # rounds as in training
        figures = held_out_figures(view.measure(model), self.metrics, self.groups)
        entry: Entry = size_of(model)
        tell(0.3)
        if self.decoding_dtype != self.matmul_dtype:  # rounds as the student is served here
            prepare_for_inference(model, dtype=self.decoding_dtype, exact=head)
        texts = None
        if self._wants_answers and kind_of(model.config) != "masked":
            answers = self._ask(
                model,
                view,
                teachers_file or AnswerFile(None),
                lambda share: tell(0.3 + 0.5 * share),
            )
            texts = [
                str(view.tokenizer.decode(answer.tokens, skip_special_tokens=True))
                for answer in answers
            ]
            judged = self._judged_teacher
            teachers = texts if is_teacher else judged.texts if judged else None
            references = [reference_of(self.valid_rows[i]) for i in self.numbers]
            groups = [self.groups[i] for i in self.numbers]
            figures |= answer_figures(
                texts, teachers, references, self.labels, self.metrics, groups
            )
            figures["answer_tokens"] = mean([len(answer.tokens) for answer in answers]).grouped(
                groups
            )
        if "speed" in self.metrics and kind_of(model.config) != "masked":
            entry |= _speed_fields(measure_speed(self.sampler_for(model), self._prompts(view)))
        del model
        gc.collect()
        tell(1.0)
        return Evaluated(with_intervals(figures) | entry, figures, texts)

    @property
    def _wants_answers(self) -> bool:
        return bool(self.metrics & ANSWER_METRICS or self.spec.distillation.evaluation.num_samples)

    def _prompts(self, view: View) -> list[tuple[int, ...]]:
        return [prompt_of(view.examples[i]) for i in self.numbers]

    def _ask(
        self, model: PreTrainedModel, view: View, file: AnswerFile, tell: Tell
    ) -> list[Generation]:
        """Returns greedy answers to the prompts. Those of the teacher are stored in its file."""
        prompts = self._prompts(view)
        room, context = self.spec.distillation.data.max_new_tokens, context_tokens(model.config)
        if self.labels:
            room = min(room, self.labels.max_tokens + TOKENS_BEYOND_A_LABEL)
        longest = max(len(prompt) for prompt in prompts)
        # the encoder reads the prompt, so prompt and answer do not share positions
        if kind_of(model.config) == "seq2seq":
            how = AnswerSampling(min(room, context), longest + room, temperature=0.0)
        else:
            how = AnswerSampling(room, min(longest + room, context), temperature=0.0)

        def progress(num_done: int, num_wanted: int, _: int) -> None:
            """Reports the share of prompts that are answered."""
            tell(num_done / num_wanted)

        return ask(prompts, how, file, lambda: self.sampler_for(model), progress)

    def _samples(self, texts: dict[str, list[str]]) -> list[Entry]:
        samples = []
        for place, i in enumerate(self.numbers[: self.spec.distillation.evaluation.num_samples]):
            row = self.valid_rows[i]
            said = {
                "prompt": row.text if row.text is not None else row.question.messages[-1]["content"]
            }
            if (reference := reference_of(row)) is not None:
                said["reference"] = reference
            said |= {name: answers[place] for name, answers in texts.items()}
            samples.append({name: text[:MAX_SAMPLE_CHARACTERS] for name, text in said.items()})
        return samples


def prompt_of(example: Example) -> tuple[int, ...]:
    """Returns the tokens that a model continues.

    Plain text has no prompt, so its first half is used.
    """
    prompt = example.prompt_ids
    if example.source_ids or len(prompt) > 1:
        return prompt
    return example.token_ids[: max(1, len(example.token_ids) // 2)]


def reference_of(row: Row) -> str | None:
    """Returns the answer in the data file, if the row has one."""
    return answer_text(row.messages[-1]) if row.text is None and row.is_answered else None


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
    for name, field_name in (
        ("speedup", "tokens_per_second"),
        ("speedup_batched", "tokens_per_second_batched"),
    ):
        if field_name in teacher:
            fields[name] = student[field_name] / teacher[field_name]
    return {name: round(value, 3) for name, value in fields.items()}


def before_and_after(result: Entry) -> Entry:
    """Returns the result of a run without a teacher, with its models named `before` and `after`."""

    def renamed(entry: Entry) -> Entry:
        """Returns the entry with the names of the models replaced."""
        return {MODELS_WITHOUT_TEACHER.get(name, name): value for name, value in entry.items()}

    result = renamed(result)
    if "differences" in result:
        result["differences"] = renamed(result["differences"])
        result["samples"] = [renamed(sample) for sample in result["samples"]]
    return result
