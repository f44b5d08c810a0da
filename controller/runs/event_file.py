"""TensorBoard events written where they arise, so that a full disk is an error there and then.

torch's `SummaryWriter` writes in a thread of its own, whose errors reach the training steps later, after a
traceback on the terminal.
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
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar


class EventFile:
    """One file of events in `folder`; TensorBoard forgets what older files say from `first_step` on."""

    def __init__(self, folder: Path, first_step: int) -> None:
        stamp = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
        self.path = folder / f"events.out.tfevents.{stamp}"
        start = SessionLog(status=SessionLog.START)
        self.append(Event(file_version="brain.Event:2"), Event(session_log=start, step=first_step))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars by tag at `step`, in the file when this returns."""
        self.append(*(Event(summary=scalar(tag, value), step=step) for tag, value in values.items()))

    def append(self, *events: Event) -> None:
        records = io.BytesIO()
        for event in events:
            event.wall_time = time.time()
            RecordWriter(records).write(event.SerializeToString())
        with self.path.open("ab") as file:
            file.write(records.getvalue())
