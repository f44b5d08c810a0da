"""`deepinsert layer-study`: finetunes at every insert layer and compares the variants with predictions.

The paper relies on the frozen model's reward to predict which variant will be best. This study finetunes one
variant per layer, evaluates all on the same held-out images, and compares the rankings.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from deepinsert.controller.options import LayerStudyOptions
from deepinsert.controller.runs.atomic_files import atomic_file, to_json
from deepinsert.controller.runs.command import run_command

from .jobs import run_steps
from .layer_study_figures import study_result
from .layer_study_page import page, plot
from .layer_study_steps import LayerStudy

FREE = ("jobs", "batch_tokens")
"""Options that change the speed and not the result."""


def run(options: LayerStudyOptions) -> dict[str, Any]:
    """Run every step in a folder of its own; write `layer_study.md`, `layer_study.png` and `result.json`.

    The same command continues an interrupted study; finished steps and a finished study are not repeated.

    Raises:
        ValueError: the folder holds another study, or an option cannot be used.
        DatasetError: the data cannot be used.
    """
    return run_command(options, partial(study_layers, options), page, free=FREE)


def study_layers(options: LayerStudyOptions, out: Path) -> dict[str, Any]:
    """Run the steps, write `layer_study.md` and `layer_study.png`, and return the result."""
    study = LayerStudy.prepare(options)
    results = run_steps(study.first_steps(), options.jobs, out / "logs")
    results |= run_steps(study.evaluations(), options.jobs, out / "logs")
    result: dict[str, Any] = to_json(study_result(study, results))
    plot(result, out / "layer_study.png")
    with atomic_file(out / "layer_study.md") as temporary:
        temporary.write_text(page(result), "utf-8")
    return result
