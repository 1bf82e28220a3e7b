"""Writes the metrics of jobs to TensorBoard event files, one for each job.

The state contains the length of the file after the last batch. The file is truncated to this length
before a batch is written, so a batch that is written again does not appear twice.
"""

import os
from io import BufferedIOBase
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
        path = folder / f"events.out.tfevents.{int(batch.created_at)}.stillhouse"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            with os.fdopen(descriptor, "r+b") as file:
                known_bytes = int(batch.state.get("bytes", 0))
                # A file that another host wrote, or that was deleted, is begun anew.
                size = known_bytes if os.fstat(file.fileno()).st_size >= known_bytes else 0
                file.truncate(size)
                file.seek(size)
                _write(file, batch)
                file.flush()
                os.fsync(file.fileno())
                return {"bytes": file.tell()}
        except OSError as fault:
            raise TrackerDown(f"{fault.strerror}: {path.name}") from fault


def _write(file: BufferedIOBase, batch: Delivery) -> None:
    # The package is optional, and it is imported only when a job uses it.
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    writer = RecordWriter(file)
    if file.tell() == 0:
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
