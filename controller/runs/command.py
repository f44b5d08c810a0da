"""The frame of all commands: check the options, reuse a finished run, write the result and print it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deepinsert.controller.option_checks import check
from deepinsert.controller.options import RunOptions

from .atomic_files import to_json
from .folder import read_result, same_run, start_run, write_result

Result = dict[str, Any]


def run_command(
    options: RunOptions | Any,
    compute: Callable[[Path], Result | None],
    summary: Callable[[Result], str],
    *,
    growing: Sequence[str] = (),
    free: Sequence[str] = (),
    reuse: bool = True,
) -> Result:
    """Run a command in its folder `options.out`, and return what its `result.json` holds.

    Args:
        options: the command's options. They are checked before anything is written.
        compute: makes the result, given the run folder. It returns None while other processes still have to
            finish their part; then nothing is written and the returned result is empty.
        summary: renders a result for the terminal.
        growing: options that may differ from those of the run in the folder, because the command extends it.
        free: options that may differ because they do not change the result, such as a number of processes.
        reuse: whether a finished run with the same options is read instead of computed again.

    Raises:
        ValueError: an option cannot be used, or the folder holds another run.
    """
    check(options)
    is_finished = reuse and same_run(options, free) and (Path(options.out) / "result.json").is_file()
    out = start_run(options, (*growing, *free))
    if is_finished:
        print(f"{out} is finished; nothing to do", file=sys.stderr)
    else:
        if growing:
            (out / "result.json").unlink(missing_ok=True)  # it belongs to other options
        result = compute(out)
        if result is None:
            return {}
        write_result(out, to_json(result))
    result = read_result(out)
    print(summary(result), flush=True)
    return result
