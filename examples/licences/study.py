"""`python -m examples.licences.study`: students of several sizes, and students from fewer labels.

Runs the jobs of `make task` with other settings, which takes more than an hour, and writes a table and a
plot. Jobs that have succeeded are not repeated, those of `make task` included.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from app.commands.demo import TEACHER, import_teacher
from examples.command import parser_of, report_problems
from examples.licences.jobs import SMALL_STUDENT, adaptation, distillation, run_job
from examples.licences.measure import Measured, measure
from examples.licences.plot import Point, draw
from examples.licences.prepare_rows import write_rows
from examples.licences.run import NUM_LABELLED, NUM_UNLABELLED
from examples.service import jobs_of, service, upload

Json = dict[str, Any]  # Any: JSON bodies of the public API
SIZES: dict[str, Json] = {
    "2 layers": {"init": "layers", "num_layers": 2},
    "6 layers": {"init": "layers", "num_layers": 6},
    "12 layers": {"init": "layers", "num_layers": 12},
    "fresh, 3 layers": {
        "init": "fresh",
        "config": {"family": "llama", "hidden_size": 576, "num_layers": 3, "num_heads": 9},
    },
}
# Labelled notices, and epochs of the adaptation: about as many steps as pay off for so many rows.
BUDGETS = {100: 6, 500: 2, NUM_LABELLED: 1}
EPOCHS_ALONE = {100: 40, 500: 12, NUM_LABELLED: 8}  # of the students that learn from labels alone


class Study:
    """The jobs of the study, and what their models answer on the test notices."""

    def __init__(self, client: httpx.Client, folder: Path, console: Console, seed: int) -> None:
        self.client = client
        self.folder = folder
        self.console = console
        self.seed = seed
        self.valid = upload(client, folder / "valid.jsonl")
        self.few = upload(client, folder / "few.jsonl")
        lines = (folder / "labelled.jsonl").read_text().splitlines(keepends=True)
        self.labelled = {number: lines[:number] for number in BUDGETS}
        self.prompts = (folder / "prompts.jsonl").read_text().splitlines(keepends=True)

    def model_of(self, body: Json) -> str:
        """Runs a job, unless it has succeeded before, and returns the id of its model."""
        done = jobs_of(self.client, body["metadata"]["example"], {"succeeded"})
        job = done[0] if done else run_job(self.client, body, self.console)
        return str(job["fine_tuned_model"])

    def file_of(self, name: str, lines: list[str]) -> str:
        """Uploads rows and returns the id of the file."""
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(lines))
        return upload(self.client, path)

    def adapted(self, number: int) -> str:
        """Returns the teacher that is adapted to this number of labelled notices."""
        rows = self.file_of(f"labelled-{number}", self.labelled[number])
        return self.model_of(
            adaptation(rows, self.few, self.seed, n_epochs=BUDGETS[number], name=name_of(number))
        )

    def without_answers(self, number: int) -> str:
        """Returns the file of the labelled notices, without their labels, and the unlabelled ones."""
        unlabelled = self.prompts[NUM_LABELLED:]
        return self.file_of(f"prompts-{number}", [*self.prompts[:number], *unlabelled])

    def measured(self, model: str) -> Measured:
        return measure(self.client, model, self.folder / "test.jsonl")

    def student(self, name: str, teacher: str, rows: str, student: Json) -> Measured:
        """Returns the figures of a student that learns from a teacher."""
        body = distillation(teacher, rows, self.valid, self.seed, student=student, name=name)
        return self.measured(self.model_of(body))

    def student_alone(self, number: int) -> Measured:
        """Returns the figures of a student that learns from the labels alone.

        It keeps all tokens of the teacher, because few rows do not contain those of other notices.
        """
        body = distillation(
            TEACHER,
            self.file_of(f"labelled-{number}", self.labelled[number]),
            self.valid,
            self.seed,
            student={**SMALL_STUDENT, "vocabulary": "all"},
            n_epochs=EPOCHS_ALONE[number],
            uses_teacher=False,
            name=f"study-labels-alone-{number}",
        )
        return self.measured(self.model_of(body))

    def run(self, budgets: Sequence[int], sizes: Sequence[str]) -> dict[str, Measured]:
        """Returns the figures of all models by name."""
        found: dict[str, Measured] = {}
        for number in sorted(budgets, reverse=True):
            self.console.rule(f"{number} labelled notices")
            teacher = self.adapted(number)
            rows = self.without_answers(number)
            self.add(found, f"teacher, {number} labels", self.measured(teacher))
            self.add(
                found,
                f"3 layers, {number} labels",
                self.student(name_of(number), teacher, rows, SMALL_STUDENT),
            )
            self.add(found, f"3 layers, {number} labels alone", self.student_alone(number))
            for name in sizes if number == NUM_LABELLED else ():
                slug = f"study-{name.replace(' ', '-')}"
                self.add(found, name, self.student(slug, teacher, rows, SIZES[name]))
        return found

    def add(self, found: dict[str, Measured], name: str, figures: Measured) -> None:
        """Adds the figures of a model and prints them, since the next one may take half an hour."""
        found[name] = figures
        self.console.print(
            f"{name}: macro-F1 {figures.macro_f1}, accuracy {figures.accuracy}, "
            f"{figures.requests_per_second:.1f} requests/s",
            highlight=False,
        )


def name_of(number: int) -> str:
    """Returns the name of the jobs with so many labels. `make task` has run those with all labels."""
    return "task" if number == NUM_LABELLED else f"study-{number}"


def show(console: Console, found: dict[str, Measured]) -> None:
    table = Table(title="1,000 test notices", title_justify="left")
    for heading in ("", "parameters", "macro-F1", "accuracy", "requests/s"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, each in found.items():
        table.add_row(
            name,
            f"{each.num_parameters / 1e6:.1f} M",
            str(each.macro_f1),
            str(each.accuracy),
            f"{each.requests_per_second:.1f}",
        )
    console.print(table)


def points_of(found: dict[str, Measured]) -> list[Point]:
    return [
        Point(name, each.requests_per_second, each.accuracy, is_teacher="teacher" in name)
        for name, each in found.items()
    ]


def main() -> None:
    parser = parser_of("licences", "study")
    parser.add_argument(
        "--plot", type=Path, default=Path("licences.png"), help="default: %(default)s"
    )
    parser.add_argument("--labels", type=int, nargs="*", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    arguments = parser.parse_args()
    console = Console()
    with report_problems("licences", arguments.json) as results:
        folder = arguments.data_dir / "licences"
        write_rows(folder, NUM_LABELLED, NUM_UNLABELLED)
        with service(arguments.data_dir, console) as client:
            import_teacher(client, arguments.data_dir, console)
            found = Study(client, folder, console, arguments.seed).run(
                arguments.labels, arguments.sizes
            )
        show(console, found)
        draw(points_of(found), arguments.plot)
        console.print(f"The plot is in {arguments.plot}", highlight=False)
        results.update({name: asdict(each) for name, each in found.items()})


if __name__ == "__main__":
    main()
