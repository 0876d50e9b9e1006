"""TensorBoard's event files, written record by record.

torch's `SummaryWriter` writes in a thread that dies with the first error of the disk, and raises it at a later call;
here a record is whole or not there, and one that the disk refuses is written later.
"""

import io
import itertools
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

from gcahng.training.appended_file import AppendedFile

_VERSION = "brain.Event:2"
_numbers = itertools.count()


class EventFile(AppendedFile):
    """A new event file of a folder."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """
        Args:
            folder: Where it is made; TensorBoard reads the event files of a folder in the order of their names.
            first_step: TensorBoard hides what earlier files of the folder hold from this step on.
        Raises:
            OSError: It cannot be made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        super().__init__(folder / name)
        self.append(
            _records(
                Event(wall_time=time.time(), step=first_step, file_version=_VERSION),
                Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START)),
            )
        )

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """One point of each curve."""
        now = time.time()
        events = [Event(wall_time=now, step=step, summary=scalar(tag, value)) for tag, value in values.items()]
        if events:
            self.append(_records(*events))


def _records(*events: Event) -> bytes:
    stream = io.BytesIO()
    writer = RecordWriter(stream)
    for event in events:
        writer.write(event.SerializeToString())
    return stream.getvalue()
