"""Command line that the examples share."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from app.commands.demo import DemoFailed


def parser_of(name: str, module: str = "run") -> argparse.ArgumentParser:
    """Returns a parser with the options of all examples."""
    parser = argparse.ArgumentParser(prog=f"python -m examples.{name}.{module}")
    parser.add_argument(
        "--data-dir",
        type=lambda text: Path(text).resolve(),
        default=Path(".stillhouse").resolve(),
        help="default: .stillhouse",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="write the results here")
    return parser


@contextmanager
def report_problems(name: str, json_path: Path | None) -> Iterator[dict[str, Any]]:  # Any: JSON
    """Context manager that writes the results it yields, and exits with one line if a step fails."""
    results: dict[str, Any] = {}
    try:
        yield results
    except DemoFailed as problem:
        sys.exit(f"{name}: {problem}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted")
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=2) + "\n")
