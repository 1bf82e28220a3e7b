"""Training process: `python -m worker.train SPEC.json --out DIR`.

It uses neither the queue nor the database, and reports with JSON lines on standard output.
After a SIGTERM it writes a checkpoint and a `stopped` line, and exits with 0. It exits with 1
after a failure; there is an `error` line only if a retry would not help.
"""

from app.fast_imports import imports_done  # isort: split

import argparse
import hashlib
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from huggingface_hub import constants as hub
from torch import Tensor
from transformers import PreTrainedModel

from app import crash_points
from app.contracts.distillation import ExportFormat
from app.contracts.run_limits import MAX_RUNNING
from app.settings import get_settings
from worker.disk import is_disk_full
from worker.distill.data.sampler import Generation
from worker.distill.data_parallel import ALONE, Ranks, join, leave
from worker.distill.missing_results import MissingPart, attempt
from worker.distill.phase_times import PhaseTimes, process_seconds
from worker.distill.pipeline import distil
from worker.distill.training.rollouts import sources_of
from worker.distill.training.trainer import Stopped
from worker.errors import DiskFull, TeacherGenerationFailed, WorkerError
from worker.jobs.multi_process import exit_like, launch
from worker.models.adapters import merge_adapters
from worker.models.gguf_writer import Kind, check_architecture, check_exportable, export_gguf
from worker.models.model_facts import model_facts
from worker.protocol.run_lines import ErrorLine, ResultLine, RunLine, StoppedLine, take_over_stdout
from worker.protocol.run_spec import RunSpec
from worker.serve.batch_generate import Continuation, generate_all
from worker.serve.errors import ServeError

imports_done()

Json = dict[str, Any]  # Any: part of the public result
KIND_OF: dict[ExportFormat, Kind] = {"gguf_f16": "f16", "gguf_q8_0": "q8_0"}


class EngineSampler:
    """Sampler of the trainer that generates with the decoder of the serving engine."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        ignore_end: bool = False,
        on_answer: Callable[[int, Generation], None] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        on_states: Callable[[int, Tensor], None] | None = None,
    ) -> list[Generation]:
        def answered(i: int, made: Continuation) -> None:
            """Passes one finished answer on to `on_answer`."""
            if on_answer is not None:
                on_answer(i, _generation(made))

        try:
            made = generate_all(
                self.model,
                prompts,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                seeds=seeds,
                end_ids=frozenset() if ignore_end else None,
                max_running=MAX_RUNNING,
                on_answer=answered,
                on_progress=on_progress,
                on_states=on_states,
            )
        except ServeError as e:
            raise TeacherGenerationFailed(str(e)) from e
        return [_generation(continuation) for continuation in made]


def _generation(made: Continuation) -> Generation:
    return Generation(tokens=made.tokens, is_finished=made.is_finished)


class StopSignal:
    """Callable that returns True once the process has received SIGTERM or SIGINT."""

    def __init__(self) -> None:
        self.is_set = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._set)

    def __call__(self) -> bool:
        return self.is_set

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True


def with_plain_models(spec: RunSpec, out: Path) -> RunSpec:
    """Returns the spec with plain models in place of adapters, which it merges into `out`."""

    def plain(folder: Path) -> Path:
        """Returns the folder of the plain model. Another rank may have written it."""
        if folder not in spec.adapter_starts:
            return folder
        start_dir = plain(spec.adapter_starts[folder])
        target = out / hashlib.sha256(bytes(folder)).hexdigest()[:16]
        return target if target.exists() else merge_adapters(start_dir, folder, target)

    dirs = {"teacher_dir": plain(spec.teacher_dir), "start_dir": plain(spec.start_dir)}
    return spec.model_copy(update=dirs)


def run(
    spec: RunSpec,
    out: Path,
    sink: Callable[[RunLine], None],
    should_stop: Callable[[], bool],
    ranks: Ranks = ALONE,
    *,
    is_process: bool = False,
) -> int:
    """Runs the spec, writes a line with its outcome to `sink`, and returns the exit status.

    `is_process` says that the run is all that this process does, so that its start counts as a part
    of the run. Errors that a retry may fix are raised.
    """
    try:
        check_exports(spec)
        phases = PhaseTimes(before_seconds=process_seconds() if is_process else 0.0)
        spec = ranks.first_then_others(lambda: with_plain_models(spec, out / "inputs"))
        outcome = distil(spec, out, sink, EngineSampler, should_stop, ranks, phases)
        leave()
        if not ranks.is_first:
            return 0
        facts = model_facts(out / outcome.folder)
        exports, missing = export(spec, out, outcome.folder, sink)
    except Stopped as stopped:
        sink(StoppedLine(step=stopped.step))
        return 0
    except Exception as error:
        line = error_line(error)
        if line is None:
            raise
        sink(line)
        return 1
    missing = [*outcome.result.get("missing", []), *missing]
    parts = {name: part for name, part in (("exports", exports), ("missing", missing)) if part}
    sink(
        ResultLine(
            folder=outcome.folder,
            facts=facts.model_dump(mode="json"),
            result={**outcome.result, **parts},
            trained_tokens=outcome.trained_tokens,
            files=(*outcome.files, *(made["file"] for made in exports)),
        )
    )
    return 0


def error_line(error: Exception) -> ErrorLine | None:
    """Returns the line for a permanent failure, or None if a retry may succeed."""
    if is_disk_full(error) and not isinstance(error, DiskFull):
        message = "the worker's disk is full; free some disk space, then resume the job"
        return ErrorLine(code=DiskFull.code, message=message)
    if isinstance(error, WorkerError):
        return ErrorLine(code=error.code, message=str(error))
    if isinstance(error, torch.OutOfMemoryError):
        message = (
            f"the device ran out of memory ({error}); lower batch_tokens or max_sequence_tokens"
        )
        return ErrorLine(code="out_of_memory", message=message)
    return None


def check_exports(spec: RunSpec) -> None:
    """Checks before training that the student can be exported. Raises WorkerError if not."""
    student = spec.distillation.student
    if spec.distillation.export and student.config is not None:
        check_architecture(student.config.family)
    elif spec.distillation.export:
        check_exportable(spec.start_dir)


def export(
    spec: RunSpec, out: Path, student: str, sink: Callable[[RunLine], None]
) -> tuple[list[Json], list[Json]]:
    """Writes the student in every requested format.

    Returns an entry for each file written to `out`, and one for each format that failed.
    """
    exports, missing = [], []
    for name in dict.fromkeys(spec.distillation.export):
        kind = KIND_OF[name]
        path = out / f"student-{kind}.gguf"
        facts = attempt(name, "export_failed", partial(export_gguf, out / student, path, kind=kind))
        if isinstance(facts, MissingPart):
            sink(facts.event("the student is registered without it"))
            missing.append(facts.model_dump())
        else:
            exports.append({"format": name, "file": path.name, "bytes": facts.bytes})
    return exports, missing


def main() -> int:
    """Runs the spec in this process, or launches one process per rank; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m worker.train", description=__doc__)
    parser.add_argument("spec", type=Path, help="a RunSpec as JSON")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoints and the student"
    )
    # Set by `worker.jobs.multi_process.launch` for the process of one rank.
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    spec = RunSpec.model_validate_json(arguments.spec.read_bytes())
    should_stop = StopSignal()
    num_processes = spec.num_processes or max(1, torch.cuda.device_count())
    if sources_of(spec.distillation):  # rollouts and their stored texts need a single process
        num_processes = 1
    if arguments.of is None and num_processes > 1:
        command = [str(arguments.spec), "--out", str(arguments.out)]
        return exit_like(launch(command, num_processes, arguments.out / ".meeting", should_stop))
    crash_points.arm(get_settings().crash_dir)
    lines = take_over_stdout()
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    hub.HF_HUB_OFFLINE = True
    ranks = join(arguments.rank, arguments.of, arguments.meeting) if arguments.of else ALONE

    def write(line: RunLine) -> None:
        """Writes a line of rank 0. Other ranks report only that memory or disk are exhausted."""
        if ranks.is_first or (
            isinstance(line, ErrorLine) and line.code in ("out_of_memory", DiskFull.code)
        ):
            lines.write(line.model_dump_json() + "\n")

    # Rank 0 decides for all ranks when to stop.
    is_asked_to_stop = should_stop if ranks.is_first else lambda: False
    return run(spec, arguments.out, write, is_asked_to_stop, ranks, is_process=True)


if __name__ == "__main__":
    sys.exit(main())
