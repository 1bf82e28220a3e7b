"""The jobs of the licences task: bodies for POST /v1/fine_tuning/jobs, and how to run them."""

import json
from typing import Any

import httpx
from rich.console import Console

from app.commands.demo import TEACHER, call, follow
from examples.service import unfinished

NUM_LAYERS = 3  # of the teacher's 30
SMALL_STUDENT = {"init": "layers", "num_layers": NUM_LAYERS}
Json = dict[str, Any]  # Any: JSON bodies of the public API


def adaptation(
    training_file: str, validation_file: str, seed: int, *, n_epochs: int = 1, name: str = "task"
) -> Json:
    """Returns the job that adapts the teacher to labelled notices."""
    return {
        "model": TEACHER,
        "training_file": training_file,
        "validation_file": validation_file,
        "suffix": "licences",
        "seed": seed,
        "metadata": {"example": f"licences-{name}-adaptation"},
        "method": {
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": n_epochs}},
        },
    }


def distillation(
    teacher: str,
    training_file: str,
    validation_file: str,
    seed: int,
    *,
    student: Json = SMALL_STUDENT,
    at_least: float | None = None,
    n_epochs: int = 4,
    uses_teacher: bool = True,
    name: str = "task",
) -> Json:
    """Returns the job that distils a student.

    The teacher answers the training notices, which have no labels. With `at_least` the job fails if
    the student's macro-F1 on the validation notices is lower. Without `uses_teacher`, the student
    learns from the labels in the rows alone.
    """
    gate = {} if at_least is None else {"gate": {"metric": "macro_f1", "at_least": at_least}}
    answers: Json = {"max_new_tokens": 6, "temperature": 0.0}
    source: Json = {"data": answers}
    if not uses_teacher:
        source = {
            "data": {"completions": "dataset", **answers},
            "objective": {"teacher_signal": "text"},
        }
    return {
        "model": teacher,
        "training_file": training_file,
        "validation_file": validation_file,
        "suffix": "licences-small",
        "seed": seed,
        "metadata": {"example": f"licences-{name}-distillation"},
        "method": {
            "type": "distillation",
            "distillation": {
                "teacher": teacher,
                "student": {"vocabulary": "rows", **student},
                **source,
                "hyperparameters": {"n_epochs": n_epochs},
                "evaluation": {
                    "metrics": ["agreement", "accuracy", "macro_f1"],
                    "num_samples": 2,
                    **gate,
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
