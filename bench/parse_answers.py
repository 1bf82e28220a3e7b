"""Counts the answers that `client.chat.completions.parse` validates, over HTTP.

    .venv/bin/python -m bench.parse_answers [--calls 100] [FOLDER ...]

Serves a tiny random model of every causal architecture that can be imported, and the models in the
given folders. Eight callers send each model many requests at temperature 1. A random model writes
any text that a schema allows, so its answers test the constraint alone.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import openai
from pydantic import BaseModel, Field, ValidationError
from rich.console import Console

from app.commands.demo import running_service
from app.contracts.architectures import distilled
from tests.tiny import save_tiny

NUM_CALLERS = 8
MAX_TOKENS = 220


class Part(BaseModel):
    """Schema of one part in an answer."""

    name: Annotated[str, Field(max_length=12)]
    kind: Literal["lamp", "jar", "still"]
    size: Annotated[int, Field(ge=0, le=999)]
    note: Annotated[str, Field(max_length=8)] | None


class Product(BaseModel):
    """Schema of an answer."""

    title: Annotated[str, Field(max_length=16)]
    is_new: bool
    parts: Annotated[list[Part], Field(min_length=1, max_length=2)]


def main() -> int:
    """Prints a line of counts per model. Returns 1 if an answer was invalid."""
    parser = argparse.ArgumentParser(prog="python -m bench.parse_answers")
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--calls", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="still-", dir="/tmp") as work:
        Path(work).chmod(0o755)  # Postgres may run as another user
        folders = {path.name.lower(): path.resolve() for path in options.folders}
        for name in distilled("causal"):
            folders[f"tiny-{name.replace('_', '-')}"] = save_tiny(Path(work) / name, name)
        data_dir = Path(work) / "data"
        with running_service(data_dir, Console()) as http:
            key = (data_dir / "api_key").read_text().strip()
            with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key=key) as client:
                counts = {
                    name: measure(client, data_dir, name, folder, options.calls)
                    for name, folder in folders.items()
                }
    print(json.dumps(counts, indent=2))
    return int(any(set(count) - {"valid", "length"} for count in counts.values()))


def measure(
    client: openai.OpenAI, data_dir: Path, name: str, folder: Path, num_calls: int
) -> Counter[str]:
    """Imports a model and returns the number of answers by outcome."""
    command = [sys.executable, "-m", "app.commands.cli", "models", "import", str(folder)]
    subprocess.run([*command, "--name", name, "--data-dir", str(data_dir)], check=True)
    with ThreadPoolExecutor(NUM_CALLERS) as pool:
        outcomes = pool.map(lambda seed: ask(client, name, seed), range(num_calls))
        return Counter(outcomes)


def ask(client: openai.OpenAI, model: str, seed: int) -> str:
    """Returns `valid`, `length`, or why the answer is not valid."""
    try:
        answer = client.chat.completions.parse(
            model=model,
            messages=[{"role": "user", "content": "Describe product 7 as JSON."}],
            response_format=Product,
            max_completion_tokens=MAX_TOKENS,
            temperature=1.0,
            seed=seed,
        )
    except openai.LengthFinishReasonError:
        return "length"
    except ValidationError as error:
        return f"invalid: {error.errors()[0]['type']}"
    except openai.APIStatusError as error:
        return f"{error.status_code} {error.code}: {error.message[:200]}"
    return "valid" if isinstance(answer.choices[0].message.parsed, Product) else "not parsed"


if __name__ == "__main__":
    sys.exit(main())
