"""Process that makes a data set: `python -m worker.build_dataset SPEC.json --out DIR`.

It uses neither the queue nor the database, and reports with JSON lines on standard output.
"""

import argparse
import logging
import sys
from contextlib import closing
from pathlib import Path

from pydantic import BaseModel

from worker.dataset.build import DatasetBuild
from worker.dataset.drafts import Records
from worker.disk import is_disk_full
from worker.errors import DiskFull, WorkerError
from worker.protocol.dataset_spec import DatasetSpec
from worker.protocol.run_lines import ErrorLine, take_over_stdout


def main() -> int:
    """Makes a data set and returns the exit status: 0 after its line, 1 after an error line.

    Standard output gets the lines only; all other output goes to standard error.
    """
    parser = argparse.ArgumentParser(prog="python -m worker.build_dataset")
    parser.add_argument("spec", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    lines = take_over_stdout()
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)

    def sink(line: BaseModel) -> None:
        """Writes one line as JSON."""
        lines.write(line.model_dump_json() + "\n")

    spec = DatasetSpec.model_validate_json(arguments.spec.read_text())
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        with closing(Records(spec.records_path)) as records:
            DatasetBuild(spec, records, sink).run(arguments.out)
    except (WorkerError, OSError) as error:
        if is_disk_full(error):
            message = (
                "the worker's disk is full; free some disk space, then create the data set again"
            )
            sink(ErrorLine(code=DiskFull.code, message=message))
        elif isinstance(error, WorkerError):
            sink(ErrorLine(code=error.code, message=str(error)))
        else:
            raise
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
