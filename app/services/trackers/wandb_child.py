"""Process that sends one batch to Weights & Biases: `python -m app.services.trackers.wandb_child`.

Reads a `Delivery` as JSON from standard input. Exits with status 0 if the batch has arrived;
otherwise it writes `{"error": ...}` to standard output and exits with status 1.
"""

import json
import sys
from collections import defaultdict

from pydantic import TypeAdapter

from app.contracts.trackers import Delivery, WandbOptions


def main() -> int:
    """Sends the batch on standard input and returns the exit status."""
    batch = TypeAdapter(Delivery).validate_json(sys.stdin.buffer.read())
    try:
        send(batch)
    except Exception as fault:  # noqa: BLE001  # the parent process reports any error
        print(json.dumps({"error": f"{type(fault).__name__}: {fault}"}))
        return 1
    return 0


def send(batch: Delivery) -> None:
    """Adds a batch to the job's run, which is created if it does not exist.

    Rows have the same numbers when a batch is sent again. The server ignores the rows it has.
    """
    import wandb  # optional, and slow to import

    options = WandbOptions.model_validate(batch.options)
    run = wandb.init(
        project=options.project,
        entity=options.entity,
        name=options.name or batch.job_id,
        tags=list(dict.fromkeys((*options.tags, "stillhouse", batch.job_id))),
        id=batch.job_id,
        config=batch.config,
        resume="allow",
        settings=wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            silent=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_update_finish_state=batch.end is not None,
        ),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    rows: dict[int, dict[str, float]] = defaultdict(dict)
    for point in batch.points:
        rows[point.step][point.name] = point.value
    first_row = int(batch.state.get("num_rows", 0))
    for number, step in enumerate(sorted(rows), first_row):
        run.log({"step": step, **rows[step]}, step=number)
    end = batch.end
    if end is not None:
        ending = {"status": end.status, "fine_tuned_model": end.fine_tuned_model}
        run.summary.update({**ending, **end.figures})
    run.finish(exit_code=0 if end is None or end.status == "succeeded" else 1)


if __name__ == "__main__":
    sys.exit(main())
