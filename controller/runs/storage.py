"""What a full disk or a folder that cannot be written does to a run: one clear line, and nothing lost.

Libraries report it in their own ways: `OSError`, safetensors' error with the number in its text, and a plain
`RuntimeError` of torch's writer.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
TORCH_WRITER = ("inline_container", "PytorchStreamWriter")  # what the errors of `torch.save` name
PROBED = 1 << 20  # bytes


class StorageError(OSError):
    """The run folder cannot be written; what was complete is still there."""


@contextmanager
def naming_storage(folder: Path, remedy: Callable[[], str]) -> Iterator[None]:
    """Turn what a full disk or a folder without permission makes of the block into a `StorageError`.

    It names `folder`, says what is wrong with it, and ends with what `remedy` says then. Other errors pass.
    """
    try:
        yield
    except StorageError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        trouble = storage_trouble(error, folder)
        if trouble is None:
            raise
        raise StorageError(f"{folder}: {trouble}. {remedy()}") from error


def storage_trouble(error: Exception, folder: Path) -> str | None:
    """What `error` says about writing to `folder`, in words; None where it is about something else."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError) and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found[1])
    elif isinstance(error, RuntimeError) and any(name in str(error) for name in TORCH_WRITER):
        number = probe(folder) or errno.EFBIG
    place = getattr(error, "filename", None)
    if number in FULL:
        return f"the disk is full ({free_space(folder)} left)"
    if number == errno.EFBIG:
        return "a file could not be written whole (a limit on the size of files, as of ulimit -f?)"
    if number in FORBIDDEN and (place is None or is_inside(Path(os.fsdecode(place)), folder)):
        return f"it cannot be written ({os.strerror(number)})"
    return None


def probe(folder: Path) -> int | None:
    """Error number of writing a little to `folder`; None where that works."""
    path = folder / ".probe.tmp"
    try:
        with path.open("wb") as file:
            file.write(bytes(PROBED))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    finally:
        if path.exists():
            path.unlink()
    return None


def free_space(folder: Path) -> str:
    """Bytes left on the disk of `folder`, or of the nearest parent that is there, in MB."""
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
    return f"{shutil.disk_usage(there).free / 1e6:,.1f} MB"


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder`, lies in it, or is a parent that could not be made."""
    path, folder = path.absolute(), folder.absolute()
    return path.is_relative_to(folder) or folder.is_relative_to(path)
