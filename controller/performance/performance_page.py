"""Writes `docs/performance.md` from finished runs: figures, their machine, the goals and the method."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepinsert.controller.runs.atomic_files import atomic_file
from deepinsert.controller.runs.folder import read_config, read_result
from deepinsert.controller.tables import markdown_table

from .performance_tables import HEADINGS, describe_cell, describe_setup, goal_summary, table_rows

PICTURES = {
    "figure12.png": "Prefill time by insert layer beside eq. (5), as in the paper's Figure 12",
    "saving_kept.png": "Share kept of the saving that the FLOPs allow",
}
INTRODUCTION = """# Performance

Generated from the runs' `result.json` by `python benchmarks/write_docs.py {runs}`; do not edit.

Every round runs the stock model and every insert layer once, in alternating order, on the same inputs. Ratios
are taken within a round; the tables give their median and quartiles. *Time* is the wall clock with the device
synchronised; *CPU time* is that of the process over all threads, which other users of a machine disturb
less. *FLOPs* is the ratio that the exact count of matrix products allows for the whole model, encoder and
head included. *Saving kept* is (1 - time ratio) / (1 - FLOPs ratio). Models have random weights, because the
time does not depend on them. Prefill is `model(**inputs, use_cache=True, logits_to_keep=1)`; decoding is
`generate`, per new token after the first; a training step takes the loss at every position. The bytes of the
KV cache are measured after the prefill and compared with the formula.
"""


def write_document(runs: Sequence[str | Path], folder: str | Path) -> Path:
    """Write `performance.md` and the runs' pictures to `folder`, and return the path of the document.

    Raises `FileNotFoundError` for a run that has not finished, `ValueError` for a run of another command.
    """
    folder = Path(folder)
    parts = [INTRODUCTION.format(runs=" ".join(Path(run).as_posix() for run in runs))]
    parts += [_run_section(Path(run), folder) for run in runs]
    path = folder / "performance.md"
    with atomic_file(path) as temporary:
        temporary.write_text("\n".join(parts), "utf-8")
    return path


def _run_section(run: Path, folder: Path) -> str:
    result = read_result(run)
    if "cells" not in result:
        raise ValueError(f"{run} holds no measured cells; give run folders of bench or of benchmarks/gpu.py")
    versions = (read_config(run) or {}).get("versions", {})
    libraries = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions
    )
    lines = [f"## {run.name}", "", f"Measured on {describe_setup(result)}; {libraries}.", ""]
    for name, title in PICTURES.items():
        if (run / name).is_file():
            target = f"performance/{run.name}-{name}"
            with atomic_file(folder / target) as temporary:
                shutil.copyfile(run / name, temporary)
            lines += [f"![{title}]({target})", ""]
    lines += ["```text", goal_summary(result), "```", ""]
    for cell in result["cells"]:
        lines += _cell_section(cell)
    return "\n".join(lines)


def _cell_section(cell: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for part in cell["parts"]:
        lines += [
            f"**{describe_cell(cell, part)}**",
            "",
            markdown_table(HEADINGS, table_rows(cell, part)),
            "",
        ]
    return lines
