"""`python -m examples.licences.run`: replaces a model of 135 million parameters by one of an eighth of its size.

Adapts SmolLM2-135M-Instruct to the classification of licence notices, distils a small student from it, and
compares the two. All steps use the public API.
"""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from app.commands.demo import import_teacher
from examples.command import parser_of, report_problems
from examples.licences.jobs import adaptation, distillation, run_job
from examples.licences.measure import Measured, measure
from examples.licences.prepare_rows import write_rows
from examples.service import service, upload

KEPT_SHARE = 0.97  # of the teacher's macro-F1 that a student must have
NUM_LABELLED, NUM_UNLABELLED = 1000, 2500
Json = dict[str, Any]  # Any: JSON bodies of the public API


def run(data_dir: Path, console: Console, seed: int) -> Json:
    """Runs all steps and returns the figures."""
    folder = data_dir / "licences"
    write_rows(folder, NUM_LABELLED, NUM_UNLABELLED)
    with service(data_dir, console) as client:
        import_teacher(client, data_dir, console)
        began = time.monotonic()
        valid, few = (upload(client, folder / name) for name in ("valid.jsonl", "few.jsonl"))
        console.rule("1. Adapt the teacher to the task")
        labelled, prompts = (
            upload(client, folder / name) for name in ("labelled.jsonl", "prompts.jsonl")
        )
        adapted = run_job(client, adaptation(labelled, few, seed), console)
        teacher = str(adapted["fine_tuned_model"])
        console.rule("2. Measure the teacher on the validation notices")
        held_out = measure(client, teacher, folder / "valid.jsonl")
        console.print(f"The teacher's macro-F1 on the validation notices: {held_out.macro_f1}")
        bound = round(KEPT_SHARE * held_out.macro_f1.value, 4)
        console.rule("3. Distil a small student")
        body = distillation(teacher, prompts, valid, seed, at_least=bound)
        job = run_job(client, body, console)
        console.rule("4. Compare them on notices that were never looked at")
        small, large = (
            measure(client, name, folder / "test.jsonl")
            for name in (str(job["fine_tuned_model"]), teacher)
        )
        minutes = (time.monotonic() - began) / 60
    show(console, large, small, minutes)
    return {
        "teacher": asdict(large),
        "student": asdict(small),
        "minutes": minutes,
        "vocabulary": job["result"]["vocabulary"],
    }


def show(console: Console, teacher: Measured, student: Measured, minutes: float) -> None:
    table = Table(
        title="1,000 test notices, answered over HTTP by 16 callers", title_justify="left"
    )
    for heading in ("", "teacher", "student"):
        table.add_column(heading, justify="left" if not heading else "right")
    both = (teacher, student)
    table.add_row("parameters", *(f"{each.num_parameters:,}" for each in both))
    table.add_row("files, MB", *(f"{each.file_bytes / 1e6:.0f}" for each in both))
    table.add_row("memory when served, MB", *(f"{each.memory_bytes / 1e6:.0f}" for each in both))
    table.add_row("macro-F1", *(str(each.macro_f1) for each in both))
    table.add_row("accuracy", *(str(each.accuracy) for each in both))
    table.add_row("requests/s", *(f"{each.requests_per_second:.1f}" for each in both))
    console.print(table)
    console.print(
        f"The student has 1/{teacher.num_parameters / student.num_parameters:.1f} of the parameters, keeps "
        f"{student.macro_f1.value / teacher.macro_f1.value:.1%} of the macro-F1 and answers "
        f"{student.requests_per_second / teacher.requests_per_second:.1f} times as many requests per second. "
        f"All took {minutes:.1f} minutes.",
        highlight=False,
    )


def main() -> None:
    arguments = parser_of("licences").parse_args()
    with report_problems("licences", arguments.json) as results:
        results.update(run(arguments.data_dir, Console(), arguments.seed))


if __name__ == "__main__":
    main()
