"""Our side of the bench, by the trainer's own step: `python -m bench.ours TASK.json`.

The one file here that knows the trainer from inside.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoTokenizer

from app.contracts.distillation import Hyperparameters, Objective, Student
from bench.cases import MAX_NEW_TOKENS, Entry
from bench.process import peak_bytes, versions
from worker.cpu import prepare_for_inference
from worker.distill.data.batching import collate
from worker.distill.data.rows import Example
from worker.distill.evaluation.held_out import HeldOutRows, rouge_l
from worker.distill.forward.shared_prefix import shared_prefix
from worker.distill.losses.divergences import TokenObjective
from worker.distill.losses.lm_head import head_of, load_head
from worker.distill.students.recipe import StudentRecipe, load_model, plan_student
from worker.distill.teachers.cached_teacher import CachedTeacher, LiveTeacher, cached_teacher
from worker.distill.teachers.row_format import Keeps
from worker.distill.teachers.signals import Signal
from worker.distill.training.automatic_values import NEWEST_DEFAULTS
from worker.distill.training.checkpoint import TrainState
from worker.distill.training.devices import ON_CPU
from worker.distill.training.inputs import TrainingInputs
from worker.distill.training.layer_choice import measure_angles, with_chosen_layers
from worker.distill.training.rollouts import MicroBatch
from worker.distill.training.trainer import Trainer
from worker.protocol.run_lines import MetricsLine, RunLine, Sink
from worker.train import EngineSampler

CACHE_BYTES = 20 * 2**30
FOREVER = 1000  # epochs; max_steps says when a training ends


def time_steps(task: Entry) -> Entry:
    """Seconds of each step over the given batches, gathering of the batch not included, as in TRL's figures."""
    losses: list[float] = []

    def sink(line: RunLine) -> None:
        if isinstance(line, MetricsLine):
            losses.append(line.values["train_loss"])

    trainer = make_trainer(task, len(task["batches"]), sink)
    seconds = []
    for indices in task["batches"]:
        batch = collate(trainer.setup.train, indices)
        begun = time.perf_counter()
        trainer._step([MicroBatch(batch)])
        seconds.append(time.perf_counter() - begun)
    return {
        "seconds": seconds,
        "losses": losses,
        "peak_bytes": peak_bytes(),
        "versions": versions(),
    }


def time_pace(task: Entry) -> Entry:
    """Seconds of the fit, of a step while the teacher's cache fills and once it is full, and the steps of an epoch."""
    begun = time.perf_counter()
    recipe = choose_recipe(task)
    chosen = time.perf_counter() - begun
    trainer = make_trainer(task, FOREVER, recipe=recipe)
    begun = time.perf_counter()
    trainer.fit()
    fitted = chosen + time.perf_counter() - begun
    batches = trainer.plan.epoch(0)[: task["num_steps"]]
    means = []
    for _ in ("filling", "full"):
        seconds = []
        for indices in batches:
            begun = time.perf_counter()
            trainer._step([MicroBatch(collate(trainer.setup.train, indices))])
            seconds.append(time.perf_counter() - begun)
        # the first loads the teacher, or warms up
        means.append(sum(seconds[1:]) / len(seconds[1:]))
    num_batches = len(trainer.plan.epoch(0))
    return {"fit": fitted, "filling": means[0], "full": means[1], "num_batches": num_batches}


def train(task: Entry) -> Entry:
    """A whole training of so many steps, with an empty cache to begin with; held-out evaluations left out.

    The choice of the layers is part of it.
    """
    begun = time.perf_counter()
    recipe = choose_recipe(task)
    chosen = time.perf_counter() - begun
    trainer = make_trainer(task, task["num_steps"], recipe=recipe)
    begun = time.perf_counter()
    trainer.fit()
    fitted = chosen + time.perf_counter() - begun
    while trainer.state.step < trainer.total_steps:
        trainer._step(trainer._next_pieces())
    seconds = chosen + time.perf_counter() - begun
    trainer.model.save_pretrained(task["student_out"])
    return {
        "seconds": seconds,
        "fit_seconds": fitted,
        "num_steps": trainer.state.step,
        "peak_bytes": peak_bytes(),
    }


def evaluator(task: Entry) -> Entry:
    """Any student on the held-out rows, whoever trained it."""
    _set_up_torch(task)
    examples, num_train = _examples(task)
    valid = examples[num_train:]
    teacher = _teacher(task, valid, keeps="hidden")
    rows = HeldOutRows(valid, first_index=0, batch_tokens=1024, device="cpu")
    model = load_model(Path(task["student_dir"])).requires_grad_(False)
    prepare_for_inference(model)
    objective = TokenObjective.from_objective(Objective())
    held_out = rows.measure(model, head_of(model, task["num_tokens"]), teacher, objective)
    made = EngineSampler(model).generate(
        [example.prompt_ids for example in valid], max_new_tokens=MAX_NEW_TOKENS, temperature=0.0
    )
    tokenizer = AutoTokenizer.from_pretrained(task["teacher_dir"])

    def text(tokens: tuple[int, ...]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    answers = [text(answer.tokens) for answer in made]
    references = [text(example.completion_ids) for example in valid]
    return {
        "kl": held_out.kl,
        "agreement": held_out.agreement,
        "perplexity": held_out.perplexity,
        "rouge_l": fmean(rouge_l(answers, references)),
    }


def choose_recipe(task: Entry) -> StudentRecipe:
    """The recipe of the task's student, with the layers that the pipeline would keep."""
    _set_up_torch(task)
    teacher_dir = Path(task["teacher_dir"])
    if "student" not in task:
        return plan_student(teacher_dir, Path(task["student_dir"]), Student(init="checkpoint"))
    recipe = plan_student(teacher_dir, teacher_dir, Student.model_validate(task["student"]))
    if not recipe.measures_layers:
        return recipe
    examples, num_train = _examples(task)
    angles = measure_angles(recipe, examples[:num_train], _floats(task), ON_CPU)
    return with_chosen_layers(recipe, angles)


def make_trainer(
    task: Entry,
    num_steps: int,
    sink: Sink = lambda line: None,
    recipe: StudentRecipe | None = None,
) -> Trainer:
    """A trainer as the pipeline makes it, for the models and rows of the task."""
    _set_up_torch(task)
    examples, num_train = _examples(task)
    contender = task["contender"]
    beta = 0.5 if contender["divergence"] == "jsd" else None
    recipe = recipe or choose_recipe(task)
    setup = TrainingInputs(
        out=Path(task["work"]) / "never-written",
        objective=Objective(divergence=contender["divergence"], beta=beta),
        hyperparameters=Hyperparameters(
            n_epochs=FOREVER,
            max_steps=num_steps,
            batch_tokens=task["batch_tokens"],
            learning_rate=task["learning_rate"],
        ),
        seed=task["seed"],
        keep_checkpoints=1,
        recipe=replace(recipe, freeze_head=not contender["trains_head"], freeze_encoder=False),
        tokenizer=AutoTokenizer.from_pretrained(task["student_dir"]),
        num_tokens=task["num_tokens"],
        train=examples[:num_train],
        valid=examples[num_train:] or examples[:1],
        teacher=_teacher(
            task, examples, keeps="expected" if contender["teacher"] == "expected" else "hidden"
        ),
        signal=Signal("logits", "both models share a tokenizer"),
        has_one_tokenizer=True,
        answers_path=None,
        inputs_sha256="",
        device="cpu",
        matmul_dtype=_floats(task),
    )
    state = TrainState(num_threads=task["num_threads"], defaults_version=NEWEST_DEFAULTS)
    return Trainer(setup, state, sink, should_stop=lambda: False, report=lambda share: share)


def _set_up_torch(task: Entry) -> None:
    torch.set_num_threads(task["num_threads"])
    torch.use_deterministic_algorithms(True)  # as every run on a CPU has it, and the next line, too
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _examples(task: Entry) -> tuple[list[Example], int]:
    data = json.loads(Path(task["rows_path"]).read_text())
    examples = []
    for row in data["rows"]:
        spans = tuple((start, end) for start, end in row["spans"])
        examples.append(
            Example(tuple(row["token_ids"]), spans, source_ids=tuple(row["source_ids"]))
        )
    return examples, data.get("num_train", len(examples))


def _floats(task: Entry) -> torch.dtype:
    """What the bodies multiply in."""
    return torch.bfloat16 if task.get("bf16") else torch.float32


def _teacher(task: Entry, examples: list[Example], *, keeps: Keeps) -> CachedTeacher:
    folder = Path(task["teacher_dir"])
    prefix = shared_prefix(examples)

    def load() -> LiveTeacher:
        model = load_model(folder)
        prepare_for_inference(model, dtype=_floats(task), exact=model.get_output_embeddings())
        return LiveTeacher(model.requires_grad_(False), prefix)

    is_live = task["contender"]["teacher"] == "live"
    return cached_teacher(
        load,
        replace(load_head(folder, task["num_tokens"]), body_dtype=_floats(task)),
        folder=Path(task["cache_dir"]),
        budget_bytes=0 if is_live else CACHE_BYTES,
        identity=f"{folder}:{len(prefix)}",
        examples=examples,
        keeps=keeps,
    )


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    ops = {"time_steps": time_steps, "time_pace": time_pace, "train": train, "judge": evaluator}
    Path(task["answer"]).write_text(json.dumps(ops[task["do"]](task)))


if __name__ == "__main__":
    main()
