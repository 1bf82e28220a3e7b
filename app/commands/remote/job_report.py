"""Jobs as they are printed: the rows of lists, the fields of one job, and its result."""

from app.commands.demo_report import FIGURES, row_value
from app.commands.remote.job_progress import duration, percent_of, progress_line, stage_of
from app.commands.remote.output import Cell, moment, show_fields, show_table
from app.commands.shell import Json, tell

HEADINGS = ("id", "status", "progress", "model", "student", "created")
MODELS = ("teacher", "untrained", "before", "ce_baseline", "student", "after")
RESULT_FIGURES = (
    *FIGURES,
    ("loss", "loss", "{:.3f}"),
    ("correct tokens", "token_accuracy", "{:.1%}"),
    ("same answer", "exact_match", "{:.1%}"),
    ("correct labels", "accuracy", "{:.1%}"),
    ("macro F1", "macro_f1", "{:.3f}"),
)
LADDER_HEADINGS = ("student", "layers", "parameters", "KL", "agreement", "gate", "chosen")


def job_row(job: Json) -> tuple[Cell, ...]:
    """Returns the cells of a job in a list."""
    stage = stage_of(job) if job["status"] == "running" else ""
    progress = f"{percent_of(job):.0f}% {stage}".strip()
    student = job["fine_tuned_model"]
    return (job["id"], job["status"], progress, job["model"], student, moment(job["created_at"]))


def show_job(job: Json) -> None:
    """Prints the fields of a job, and its result if there is one."""
    begin, end = job["started_at"], job["finished_at"]
    labels = " ".join(f"{key}={value}" for key, value in job["metadata"].items())
    is_live = job["status"] in ("queued", "running")
    show_fields(
        (
            ("id", job["id"]),
            ("status", job["status"]),
            ("method", job["method"]["type"]),
            ("progress", progress_line(job) if is_live else None),
            ("pause reason", job["pause_reason"]),
            ("error", job["error"]["message"]),
            ("error code", job["error"]["code"]),
            ("model", job["model"]),
            ("teacher", job["teacher"]),
            ("student", job["fine_tuned_model"]),
            ("training file", job["training_file"]),
            ("validation file", job["validation_file"]),
            ("result files", " ".join(job["result_files"])),
            ("labels", labels),
            ("created", moment(job["created_at"])),
            ("started", moment(begin)),
            ("ended", moment(end)),
            ("took", duration(end - begin) if begin and end else None),
            ("attempts", job["attempt"]),
            ("trained tokens", job["trained_tokens"]),
        )
    )
    if job["result"]:
        show_result(job["result"])


def show_result(result: Json) -> None:
    """Prints the figures of the job's models, one column per model, and those of a ladder."""
    models = [name for name in MODELS if result.get(name)]
    if models:
        counts = (result.get("num_train_rows"), result.get("num_validation_rows"))
        tell("\nTraining rows: {}; held-out rows: {}".format(*counts))
        rows = [
            (heading, *(row_value(result[model], name, form) for model in models))
            for heading, name, form in RESULT_FIGURES
            if any(result[model].get(name) is not None for model in models)
        ]
        show_table(("", *models), rows)
    if result.get("ladder"):
        tell("\nThe students of the ladder:")
        show_table(LADDER_HEADINGS, [_ladder_row(entry) for entry in result["ladder"]])
    for part in result.get("missing", []):
        tell(f"{part['part']} is missing: {part['message']}")


def _ladder_row(entry: Json) -> tuple[Cell, ...]:
    return (
        entry.get("label"),
        entry.get("num_layers"),
        row_value(entry, "num_parameters", "{:,}"),
        row_value(entry, "kl", "{:.3f}"),
        row_value(entry, "agreement", "{:.1%}"),
        None if entry.get("passed") is None else "passed" if entry["passed"] else "failed",
        "yes" if entry.get("chosen") else "",
    )
