"""Writes the metrics of jobs to TensorBoard event files, in a folder for each job.

The state contains the number of the newest file and its length after the last batch. After a crash,
a file can be longer than that. If the additional bytes are the beginning of the batch that is
written again, the rest of the batch is appended, so nothing appears twice. Otherwise the batch
begins the next file. A file is never truncated, because TensorBoard may be reading it.
"""

import os
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

from app.contracts.trackers import Delivery, Json, RunEnd, TrackerDown


class TensorboardFiles:
    """Event files below one folder, which TensorBoard can read at any time."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def deliver(self, batch: Delivery) -> Json:
        """Writes a batch and returns the state for the next one. Raises TrackerDown."""
        folder = self._root / batch.job_id
        newest = int(batch.state.get("file", 0))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for number in count(newest):
                known_bytes = int(batch.state.get("bytes", 0)) if number == newest else 0
                num_bytes = _append(folder / _name(batch, number), known_bytes, batch)
                if num_bytes is not None:
                    return {"file": number, "bytes": num_bytes}
        except OSError as fault:
            raise TrackerDown(f"{fault.strerror}: {folder.name}") from fault
        raise AssertionError("some number has no file yet")


def _name(batch: Delivery, number: int) -> str:
    """Returns the name of an event file. TensorBoard reads files in the order of their names."""
    name = f"events.out.tfevents.{int(batch.created_at)}.stillhouse"
    return f"{name}.{number:06}" if number else name


def _append(path: Path, known_bytes: int, batch: Delivery) -> int | None:
    """Writes a batch after the first `known_bytes` of a file and returns their new number.

    Returns None, without changes, if the file is shorter or has other bytes at this position.
    """
    content = _serialised(batch, begins_file=known_bytes == 0)
    if known_bytes and not path.exists():
        return None
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
        if os.fstat(file.fileno()).st_size < known_bytes:  # of another host, for example
            return None
        file.seek(known_bytes)
        written = file.read(len(content))
        if not content.startswith(written):
            return None
        file.seek(known_bytes + len(written))
        file.write(content[len(written) :])
        file.flush()
        os.fsync(file.fileno())
    return known_bytes + len(content)


def _serialised(batch: Delivery, *, begins_file: bool) -> bytes:
    """Returns the records of a batch. They are equal whenever the batch is sent again."""
    # The package is optional, and it is imported only when a job uses it.
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = BytesIO()
    writer = RecordWriter(buffer)
    if begins_file:
        event = Event(wall_time=batch.created_at, file_version="brain.Event:2")
        writer.write(event.SerializeToString())
        writer.write(_text("config", batch.config, batch.created_at, 0))
    for point in batch.points:
        value = Summary.Value(tag=point.name, simple_value=point.value)
        event = Event(wall_time=point.created_at, step=point.step, summary=Summary(value=[value]))
        writer.write(event.SerializeToString())
    end = batch.end
    if end is not None:
        values = [
            Summary.Value(tag=name, simple_value=value) for name, value in end.figures.items()
        ]
        event = Event(wall_time=end.finished_at, step=end.last_step, summary=Summary(value=values))
        writer.write(event.SerializeToString())
        writer.write(_text("job", _ending(end), end.finished_at, end.last_step))
    return buffer.getvalue()


def _ending(end: RunEnd) -> Json:
    return {"status": end.status, "fine_tuned_model": end.fine_tuned_model or "–"}


def _text(tag: str, values: Json, at: float, step: int) -> bytes:
    """Returns an event for TensorBoard's text page, which shows the values as a table."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    lines = ["| name | value |", "|---|---|", *(f"| {key} | {values[key]} |" for key in values)]
    plugin = SummaryMetadata.PluginData(plugin_name="text")
    tensor = TensorProto(
        dtype="DT_STRING",
        string_val=["\n".join(lines).encode()],
        tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
    )
    value = Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin), tensor=tensor)
    event: Any = Event(wall_time=at, step=step, summary=Summary(value=[value]))  # Any: no types
    serialised: bytes = event.SerializeToString()
    return serialised
