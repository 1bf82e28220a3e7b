"""Event files after crashes, as TensorBoard's own reader finds them."""

from pathlib import Path
from typing import Any

import pytest

from app.contracts.trackers import Delivery, MetricPoint
from app.services.trackers.tensorboard_files import TensorboardFiles

JOB = "ftjob-1"


def batch(steps: range, state: dict[str, Any] | None = None, *, value: float = 0.5) -> Delivery:
    points = tuple(MetricPoint("loss", step, value, 1000.0 + step) for step in steps)
    return Delivery(JOB, 1000.0, {}, state or {}, {"model": "big"}, points)


def open_reader(folder: Path) -> Any:  # Any: TensorBoard has no types
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / JOB))


def steps_of(reader: Any) -> list[int]:  # Any: TensorBoard has no types
    return [event.step for event in reader.Reload().Scalars("loss")]


@pytest.mark.parametrize("num_lost_bytes", [0, 1, 30, 70])
def test_an_interrupted_batch_is_completed_while_a_reader_holds_the_file(
    tmp_path: Path, num_lost_bytes: int
) -> None:
    files, reader = TensorboardFiles(tmp_path), open_reader(tmp_path)
    state = files.deliver(batch(range(1, 3)))
    second = batch(range(3, 6), state)
    complete = files.deliver(second)
    (path,) = (tmp_path / JOB).iterdir()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - num_lost_bytes])  # as after a crash
    assert set(steps_of(reader)) <= {1, 2, 3, 4, 5}
    assert files.deliver(second) == complete, "the batch is sent again with the old state"
    assert path.read_bytes() == content
    assert steps_of(reader) == [1, 2, 3, 4, 5]


def test_a_batch_begins_a_further_file_after_other_data(tmp_path: Path) -> None:
    files, reader = TensorboardFiles(tmp_path), open_reader(tmp_path)
    state = files.deliver(batch(range(1, 3)))
    (path,) = (tmp_path / JOB).iterdir()
    path.write_bytes(path.read_bytes() + bytes(100))  # as after a power failure
    content = path.read_bytes()
    assert steps_of(reader) == [1, 2]
    further = files.deliver(batch(range(3, 5), state))
    assert further["file"] == 1
    assert files.deliver(batch(range(3, 5), state)) == further
    files.deliver(batch(range(5, 6), further))
    assert path.read_bytes() == content, "a file that may be open is not changed"
    assert len(list((tmp_path / JOB).iterdir())) == 2
    assert steps_of(reader) == [1, 2, 3, 4, 5]


def test_a_file_that_was_deleted_or_is_too_short_is_followed_by_a_further_one(
    tmp_path: Path,
) -> None:
    files = TensorboardFiles(tmp_path)
    state = files.deliver(batch(range(1, 3)))
    (path,) = (tmp_path / JOB).iterdir()
    path.unlink()
    assert files.deliver(batch(range(3, 5), state))["file"] == 1
    assert not path.exists()
    assert steps_of(open_reader(tmp_path)) == [3, 4]


def test_a_file_of_an_older_version_is_continued(tmp_path: Path) -> None:
    files = TensorboardFiles(tmp_path)
    state = files.deliver(batch(range(1, 3)))
    second = batch(range(3, 5), {"bytes": state["bytes"]})
    assert files.deliver(second)["file"] == 0
    assert steps_of(open_reader(tmp_path)) == [1, 2, 3, 4]
