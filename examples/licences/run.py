"""`python -m examples.licences.run`: replaces a model of 135 million parameters by one of an eighth of its size.

Adapts SmolLM2-135M-Instruct to the classification of licence notices, distils a small student from it, and
compares the two. All steps use the public API.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from app.commands.demo import TEACHER, call, follow, import_teacher
from examples.command import parser_of, report_problems
from examples.licences.measure import Measured, ask_all, measure, read_messages
from examples.licences.prepare_rows import write_rows
from examples.service import service, unfinished, upload

KEPT_SHARE = 0.97  # of the teacher's macro-F1 that a student must have
NUM_LAYERS = 3  # of the teacher's 30
NUM_LABELLED, NUM_UNLABELLED = 1000, 2500
ADAPTATION, DISTILLATION = (
    "licences-adaptation",
    "licences-distillation",
)  # in the metadata of the jobs
Json = dict[str, Any]  # Any: JSON bodies of the public API


def adaptation_body(training_file: str, validation_file: str, seed: int) -> Json:
    """Returns the job that adapts the teacher to the labelled notices."""
    return {
        "model": TEACHER,
        "training_file": training_file,
        "validation_file": validation_file,
        "suffix": "licences",
        "seed": seed,
        "metadata": {"example": ADAPTATION},
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
    }


def distillation_body(
    teacher: str, training_file: str, validation_file: str, bound: float, seed: int
) -> Json:
    """Returns the job that distils the student. It fails if the student is below the bound."""
    return {
        "model": teacher,
        "training_file": training_file,
        "validation_file": validation_file,
        "suffix": "licences-small",
        "seed": seed,
        "metadata": {"example": DISTILLATION},
        "method": {
            "type": "distillation",
            "distillation": {
                "teacher": teacher,
                "student": {"init": "layers", "num_layers": NUM_LAYERS, "vocabulary": "rows"},
                "data": {"completions": "dataset", "max_new_tokens": 6, "temperature": 0.0},
                "hyperparameters": {"n_epochs": 4, "eval_steps": 200},
                "evaluation": {
                    "metrics": ["agreement", "accuracy", "macro_f1"],
                    "num_samples": 2,
                    "gate": {"metric": "macro_f1", "at_least": round(bound, 4)},
                },
            },
        },
    }


def run_job(client: httpx.Client, body: Json, console: Console) -> Json:
    """Runs a job to its end. Follows one of an interrupted run of this example, if there is one."""
    if (job_id := unfinished(client, body["metadata"]["example"])) is not None:
        console.print(f"Following the job {job_id} of an earlier, interrupted run")
        return follow(client, job_id, console)
    console.print("The request body for POST /v1/fine_tuning/jobs:")
    console.print_json(json.dumps(body))
    job = call(client, "POST", "/v1/fine_tuning/jobs", json=body)
    return follow(client, str(job["id"]), console)


def label(client: httpx.Client, teacher: str, folder: Path) -> Path:
    """Writes the labelled rows, and the unlabelled ones with the teacher's answers, as one file."""
    prompts = read_messages(folder / "unlabelled.jsonl")
    answers, _ = ask_all(client, teacher, prompts)
    lines = [
        json.dumps({"messages": [*prompt, {"role": "assistant", "content": answer}]}) + "\n"
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    path = folder / "answered.jsonl"
    path.write_text((folder / "labelled.jsonl").read_text() + "".join(lines))
    return path


def run(data_dir: Path, console: Console, seed: int) -> Json:
    """Runs all steps and returns the figures."""
    folder = data_dir / "licences"
    write_rows(folder, NUM_LABELLED, NUM_UNLABELLED)
    with service(data_dir, console) as client:
        import_teacher(client, data_dir, console)
        began = time.monotonic()
        valid = upload(client, folder / "valid.jsonl")
        console.rule("1. Adapt the teacher to the task")
        adapted = run_job(
            client, adaptation_body(upload(client, folder / "labelled.jsonl"), valid, seed), console
        )
        teacher = str(adapted["fine_tuned_model"])
        console.rule("2. The teacher labels more notices")
        training = upload(client, label(client, teacher, folder))
        held_out = measure(client, teacher, folder / "valid.jsonl")
        console.print(f"The teacher's macro-F1 on the validation notices: {held_out.macro_f1}")
        bound = KEPT_SHARE * held_out.macro_f1.value
        console.rule("3. Distil a small student")
        job = run_job(client, distillation_body(teacher, training, valid, bound, seed), console)
        console.rule("4. Compare them on notices that were never looked at")
        compared = [
            (
                name,
                measure(client, name, folder / "test.jsonl"),
                call(client, "GET", f"/v1/models/{name}"),
            )
            for name in (teacher, str(job["fine_tuned_model"]))
        ]
        minutes = (time.monotonic() - began) / 60
        figures = show(console, compared, minutes)
    return {**figures, "vocabulary": job["result"]["vocabulary"]}


def show(console: Console, compared: list[tuple[str, Measured, Json]], minutes: float) -> Json:
    """Prints the table and returns its figures."""
    (_, teacher, large), (_, student, small) = compared
    table = Table(
        title="1,000 test notices, answered over HTTP by 16 callers", title_justify="left"
    )
    for heading in ("", "teacher", "student"):
        table.add_column(heading, justify="left" if not heading else "right")
    sizes = [model["num_parameters"] for model in (large, small)]
    table.add_row("parameters", *(f"{size:,}" for size in sizes))
    table.add_row("macro-F1", str(teacher.macro_f1), str(student.macro_f1))
    table.add_row("accuracy", str(teacher.accuracy), str(student.accuracy))
    speeds = [teacher.requests_per_second, student.requests_per_second]
    table.add_row("requests/s", *(f"{speed:.1f}" for speed in speeds))
    console.print(table)
    kept = student.macro_f1.value / teacher.macro_f1.value
    console.print(
        f"The student has 1/{sizes[0] / sizes[1]:.1f} of the parameters, keeps {kept:.1%} of the macro-F1 and answers "
        f"{speeds[1] / speeds[0]:.1f} times as many requests per second. All took {minutes:.1f} minutes.",
        highlight=False,
    )
    return {
        "teacher": asdict(teacher),
        "student": asdict(student),
        "parameters": sizes,
        "kept_share": kept,
        "speedup": speeds[1] / speeds[0],
        "minutes": minutes,
    }


def main() -> None:
    arguments = parser_of("licences").parse_args()
    with report_problems("licences", arguments.json) as results:
        results.update(run(arguments.data_dir, Console(), arguments.seed))


if __name__ == "__main__":
    main()
