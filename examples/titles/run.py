"""`python -m examples.titles.run`: distils the titles teacher through the API, and asks the student for a title.

Uses the `stillhouse up` of the data folder if one runs, else starts one and stops it at the end.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from app.commands.demo import DemoFailed, call, follow
from app.commands.demo_report import MODELS, row_value, show_samples
from examples.command import parser_of, report_problems
from examples.service import service, unfinished, upload
from examples.titles.prepare_teacher import EXAMPLE

TEACHER = "titles"
MAX_TITLE_TOKENS = 24
# The copied encoder is frozen, so its outputs are made once; of the decoder's 8 layers the first and last two are kept.
STUDENT = {
    "init": "layers",
    "num_encoder_layers": 8,
    "num_decoder_layers": 4,
    "freeze_encoder": True,
    "freeze_head": True,
}
METRICS = ["perplexity", "agreement", "rouge_l", "exact_match", "speed"]
ROWS = (
    ("parameters", "num_parameters", "{:,}"),
    ("KL to the teacher", "kl", "{:.3f}"),
    ("agreement, top token", "agreement", "{:.1%}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("ROUGE-L to the teacher", "rouge_l", "{:.3f}"),
    ("same title", "exact_match", "{:.1%}"),
    ("tokens/s, 1 request", "tokens_per_second", "{:.0f}"),
    ("tokens/s, 8 requests", "tokens_per_second_batched", "{:.0f}"),
)
Json = dict[str, Any]  # Any: JSON bodies of the public API


def job_body(training_file: str, validation_file: str, *, n_epochs: int, seed: int) -> Json:
    """What is posted to /v1/fine_tuning/jobs."""
    return {
        "model": TEACHER,
        "training_file": training_file,
        "validation_file": validation_file,
        "suffix": "short",
        "seed": seed,
        "metadata": {"example": "titles"},
        "method": {
            "type": "distillation",
            "distillation": {
                "teacher": TEACHER,
                "student": STUDENT,
                "data": {
                    "completions": "teacher",
                    "temperature": 0.0,
                    "max_new_tokens": MAX_TITLE_TOKENS,
                },
                "objective": {"divergence": "forward_kl"},
                "hyperparameters": {
                    "n_epochs": n_epochs,
                    "batch_tokens": 2048,
                    "learning_rate": 1e-3,
                },
                "evaluation": {"metrics": METRICS, "num_samples": 6},
            },
        },
    }


def prepare(folder: Path) -> None:
    """The teacher's checkpoint and the rows, made unless they are there."""
    if not (folder / "teacher" / "tokenizer_config.json").exists():  # written last
        python("examples.titles.prepare_teacher", str(folder / "teacher"))
    if not (folder / "rows" / "valid.jsonl").exists():
        python("examples.titles.prepare_rows", str(folder / "rows"))


def import_teacher(client: httpx.Client, folder: Path, data_dir: Path) -> None:
    if all(model["id"] != TEACHER for model in call(client, "GET", "/v1/models")["data"]):
        source = str(folder / "teacher")
        python(
            "app.commands.cli",
            "models",
            "import",
            source,
            "--name",
            TEACHER,
            "--data-dir",
            str(data_dir),
        )


def python(module: str, *arguments: str) -> None:
    if subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode != 0:
        raise DemoFailed(f"{module} failed; see the error above")


def post(client: httpx.Client, folder: Path, console: Console, n_epochs: int, seed: int) -> str:
    files = [upload(client, folder / "rows" / f"{name}.jsonl") for name in ("train", "valid")]
    body = job_body(files[0], files[1], n_epochs=n_epochs, seed=seed)
    console.print("The request body for POST /v1/fine_tuning/jobs:")
    console.print_json(json.dumps(body))
    return str(call(client, "POST", "/v1/fine_tuning/jobs", json=body)["id"])


def show_figures(console: Console, result: Json) -> None:
    table = Table(
        title=f"On {result['num_validation_rows']} held-out entries", title_justify="left"
    )
    table.add_column("", min_width=24)
    for _, heading in MODELS:
        table.add_column(heading, justify="right")
    for heading, name, form in ROWS:
        table.add_row(heading, *(row_value(result[model], name, form) for model, _ in MODELS))
    console.print(table)


def ask_for_title(client: httpx.Client, model: str, entry: str) -> str:
    body = {"model": model, "prompt": entry, "max_tokens": MAX_TITLE_TOKENS, "temperature": 0}
    return str(call(client, "POST", "/v1/completions", json=body)["choices"][0]["text"]).strip()


def run(data_dir: Path, console: Console, *, n_epochs: int, seed: int) -> Json:
    """The whole example; returns the job."""
    folder = data_dir / "titles"
    prepare(folder)
    with service(data_dir, console) as client:
        import_teacher(client, folder, data_dir)
        began = time.monotonic()
        job = follow(
            client,
            unfinished(client, "titles") or post(client, folder, console, n_epochs, seed),
            console,
        )
        console.print(
            f"{(time.monotonic() - began) / 60:.1f} minutes from the upload to the result."
        )
        show_figures(console, job["result"])
        show_samples(console, job["result"])
        console.print("\n[bold]The served student:[/bold] ", end="")
        console.print(EXAMPLE, markup=False, highlight=False)
        console.print(
            f"  {ask_for_title(client, job['fine_tuned_model'], EXAMPLE)}",
            markup=False,
            highlight=False,
        )
    return job


def main() -> None:
    parser = parser_of("titles")
    parser.add_argument("--epochs", type=int, default=1, help="default: %(default)s")
    arguments = parser.parse_args()
    with report_problems("titles", arguments.json) as results:
        results.update(
            run(arguments.data_dir, Console(), n_epochs=arguments.epochs, seed=arguments.seed)
        )


if __name__ == "__main__":
    main()
