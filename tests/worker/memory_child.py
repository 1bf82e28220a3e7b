"""Memory of one task in a process of its own: `python -m tests.worker.memory_child TASK FOLDER OUT`.

Prints the peak resident memory that the task added, in bytes. Pages of mapped files count as
resident. The task first runs with a tiny model in FOLDER/tiny, so that what is imported on first
use does not count. The measured model is in FOLDER/large.
"""

import sys
from pathlib import Path

import torch

from app.contracts.distillation import Student
from bench.gpu.memory import peak_bytes, reset_peak
from tests.worker.memory_sink import MemorySink
from worker.distill.students.recipe import plan_student
from worker.import_model import import_model
from worker.protocol.import_spec import ImportSpec


def import_folder(folder: Path, out: Path) -> None:
    """Imports a model folder."""
    import_model(ImportSpec(format="folder", source_path=folder), out, MemorySink())


def build_student(folder: Path, out: Path) -> None:
    """Builds a student with a quarter of the layers."""
    plan_student(folder, folder, Student(num_layers=1)).build()


TASKS = {"import": import_folder, "student": build_student}


def main() -> None:
    """Runs one task twice and measures the second time."""
    name, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    TASKS[name](folder / "tiny", out / "tiny")
    reset_peak("cpu")
    before = peak_bytes("cpu")
    TASKS[name](folder / "large", out / "large")
    print(peak_bytes("cpu") - before)


if __name__ == "__main__":
    main()
