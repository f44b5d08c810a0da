"""TensorBoard event files that are written in the calling thread, so that a full disk is an error at once.

torch's `SummaryWriter` writes in another thread: its errors reach the training steps later, after a traceback
on the terminal.
"""

from __future__ import annotations

import io
import os
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class EventFile:
    """One file of events in `folder`. TensorBoard ignores the events of older files from `first_step` on."""

    def __init__(self, folder: Path, first_step: int) -> None:
        stamp = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
        self.path = folder / f"events.out.tfevents.{stamp}"
        start = SessionLog(status=SessionLog.START)
        self.append(Event(file_version="brain.Event:2"), Event(session_log=start, step=first_step))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars by tag at `step`; they are in the file when this returns."""
        scalars = [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()]
        self.append(*(Event(summary=Summary(value=[scalar]), step=step) for scalar in scalars))

    def append(self, *events: Event) -> None:
        """Append `events` to the file, stamped with the current time."""
        records = io.BytesIO()
        for event in events:
            event.wall_time = time.time()
            RecordWriter(records).write(event.SerializeToString())
        with self.path.open("ab") as file:
            file.write(records.getvalue())
