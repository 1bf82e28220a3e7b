"""Output of the demo: a table that compares the models, sample answers and next commands."""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from app.commands.shell import Json

MODELS = (("teacher", "teacher"), ("untrained", "untrained"), ("student", "distilled"))
FIGURES = (
    ("layers", "num_layers", "{}"),
    ("parameters", "num_parameters", "{:,}"),
    ("bytes", "weights_bytes", "{:,}"),
    ("tokens/s, 1 request", "tokens_per_second", "{:.0f}"),
    ("tokens/s, 8 requests", "tokens_per_second_batched", "{:.0f}"),
    ("KL to the teacher", "kl", "{:.3f}"),
    ("agreement, top token", "agreement", "{:.1%}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("ROUGE-L to the teacher", "rouge_l", "{:.3f}"),
)


def row_value(figures: Json, name: str, form: str) -> str:
    """Returns one figure as text for a table cell, or a dash if it is missing."""
    value = figures.get(name)
    return "–" if value is None else form.format(value)


def show_comparison(console: Console, result: Json) -> None:
    """Prints a table of the teacher and the student before and after distillation."""
    title = f"Results on {result['num_validation_rows']} held-out prompts, after training on {result['num_train_rows']}"
    table = Table(title=title, title_justify="left")
    table.add_column("", min_width=24)
    for _, heading in MODELS:
        table.add_column(heading, justify="right")
    for heading, name, form in FIGURES:
        table.add_row(
            heading, *(row_value(result.get(model, {}), name, form) for model, _ in MODELS)
        )
    console.print(table)
    console.print(
        "KL (nats per token), agreement and perplexity are measured on the teacher's greedy answers, token by token. "
        "ROUGE-L is measured on answers that the models generate themselves. Speeds are measured on this machine, with "
        "the same number of tokens for each model."
    )
    for part in result.get("missing", []):
        console.print(f"{part['part']} is missing: {part['message']}", markup=False)
    compression = result.get("compression", {})
    if "speedup" not in compression:
        return
    console.print(
        f"The student is {compression['parameters']:.2f}x smaller than the teacher. It is {compression['speedup']:.2f}x "
        f"as fast with one request, and {compression['speedup_batched']:.2f}x as fast with eight requests at once."
    )


def show_samples(console: Console, result: Json) -> None:
    """Prints the answers of the three models to a few held-out prompts."""
    console.print("\n[bold]Greedy answers to held-out prompts, unedited[/bold]")
    for sample in result.get("samples", []):
        console.print(f"\n[bold]{sample['prompt']}[/bold]", highlight=False)
        for model, heading in MODELS:
            answer = " ".join(str(sample[model]).split())
            console.print(f"  {heading:>17}: ", end="")
            console.print(answer, markup=False, highlight=False)


def show_next_commands(console: Console, data_dir: Path, model: str) -> None:
    """Prints three commands that can be pasted into the shell that ran the demo."""
    stillhouse = _from_here(Path(sys.executable).parent / "stillhouse")
    data_dir = _from_here(data_dir)
    chat = (
        f'curl -s http://127.0.0.1:8400/v1/chat/completions -H "Authorization: Bearer $(cat {data_dir}/api_key)" '
        f'-H \'Content-Type: application/json\' -d \'{{"model": "{model}", '
        '"messages": [{"role": "user", "content": "What is money? Answer in one short sentence."}]}\''
    )
    commands = (
        ("serve the student again, in another terminal", f"{stillhouse} up --data-dir {data_dir}"),
        ("send it a chat request", chat),
        ("list the registered models", f"{stillhouse} models list --data-dir {data_dir}"),
    )
    console.print("\n[bold]Next[/bold]")
    for what, command in commands:
        console.print(f"  # {what}", style="dim")
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)


def _from_here(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
