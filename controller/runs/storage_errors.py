"""One clear error for a full disk or a folder that cannot be written.

Libraries report these in different ways: as `OSError`, as safetensors' error with the error number in its
text, and as a plain `RuntimeError` of torch's writer.
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
TORCH_WRITER = ("inline_container", "PytorchStreamWriter")  # names in the errors of `torch.save`
PROBE_BYTES = 1 << 20


class StorageError(OSError):
    """The run folder cannot be written; files that were complete are still there."""


@contextmanager
def explain_storage_errors(folder: Path, remedy: Callable[[], str]) -> Iterator[None]:
    """Turn an error of the block that a full disk or a missing permission has caused into a `StorageError`.

    Its message names `folder` and what is wrong with it, and ends with the text that `remedy` returns at that
    time. Other errors pass unchanged.
    """
    try:
        yield
    except StorageError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        problem = storage_problem(error, folder)
        if problem is None:
            raise
        raise StorageError(f"{folder}: {problem}. {remedy()}") from error


def storage_problem(error: Exception, folder: Path) -> str | None:
    """Return why `folder` cannot be written according to `error`, or None if the error has another cause."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError) and (match := re.search(r"os error (\d+)", str(error))):
        number = int(match[1])
    elif isinstance(error, RuntimeError) and any(name in str(error) for name in TORCH_WRITER):
        number = write_error(folder) or errno.EFBIG
    filename = getattr(error, "filename", None)
    if number in FULL:
        return f"the disk is full ({free_space(folder)} left)"
    if number == errno.EFBIG:
        return "a file could not be written whole (a limit on the size of files, as of ulimit -f?)"
    if number in FORBIDDEN and (filename is None or is_related(Path(os.fsdecode(filename)), folder)):
        return f"it cannot be written ({os.strerror(number)})"
    return None


def write_error(folder: Path) -> int | None:
    """Write `PROBE_BYTES` to `folder` and return the error number, or None if that succeeds."""
    path = folder / ".probe.tmp"
    try:
        with path.open("wb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    finally:
        if path.exists():
            path.unlink()
    return None


def free_space(folder: Path) -> str:
    """Return the free space in MB on the disk of `folder`, or of its nearest parent that exists."""
    nearest = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
    return f"{shutil.disk_usage(nearest).free / 1e6:,.1f} MB"


def is_related(path: Path, folder: Path) -> bool:
    """Return whether `path` is `folder`, lies in it, or is one of its parents."""
    path, folder = path.absolute(), folder.absolute()
    return path.is_relative_to(folder) or folder.is_relative_to(path)
