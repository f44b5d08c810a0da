"""`deepinsert bench`: time and memory by insert layer beside the untouched stock model, cell by cell.

Without a backbone, it measures a LLaVA with random weights that is large enough for arithmetic to dominate;
with one, it measures that model on rendered images. Each finished cell is a file, so that the same command
continues where it stopped.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deepinsert.backbones import CostModel, eq5_flops, load_backbone, remove_deep_insert
from deepinsert.backbones.compat.transformers import attention_of
from deepinsert.controller.answers.batched import generation_inputs
from deepinsert.controller.option_checks import BENCH_CASES, parse_cases, parse_layers
from deepinsert.controller.options import BenchOptions
from deepinsert.controller.runs.atomic_files import write_json
from deepinsert.controller.runs.command import run_command
from deepinsert.controller.runs.machine import machine_facts
from deepinsert.controller.runs.progress_bars import cost_progress_bar

from . import ideal_ratios as ideal
from .grids import PER_ROW, QUARTERS, Cell, full_grid, narrow_grid, quick_grid
from .ideal_ratios import Setting
from .measured_cases import measure
from .performance_pictures import draw_figure12, draw_saving_kept
from .performance_tables import result_text
from .random_models import BENCH_MODELS, build_bench_model
from .sample_batches import Batch, describe_batch, make_batch, tokens_per_image

BACKBONE_CASES = ("prefill", "decode", "rows")
"""Cases that are measured on a user's backbone by default."""

FORWARDS_PER_RUN: dict[str, float] = {"train-full": 3, "train-lora": 2, "decode": 1.5}
"""Rough time of a run in forwards, to estimate the time left; other cases take one forward."""

logger = logging.getLogger("deepinsert")


@dataclass(frozen=True)
class Subject:
    """A stock model in eval mode that is measured, with its costs and a batch for it."""

    model: Any
    costs: CostModel
    batch: Batch
    size: str
    """The model's size in words."""


def run(options: BenchOptions) -> dict[str, Any]:
    """Measure the cells; write `cells/*.json`, `figure12.png`, `saving_kept.png` and `result.json`.

    A finished run is not repeated. Raises `ValueError` if the folder holds another run or an option cannot be
    used.
    """

    def measure_all(out: Path) -> dict[str, Any]:
        with torch_threads(options.threads):
            cells, subject_of = plan(options)
            return draw_and_describe(measure_cells(cells, subject_of, out), out)

    return run_command(options, measure_all, result_text)


@contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """Use `number` torch threads inside this block; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def plan(options: BenchOptions) -> tuple[list[Cell], Callable[[Cell], Subject]]:
    """Return the cells to measure, and a function that returns the subject of a cell."""
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.backbone not in BENCH_MODELS:
        return _plan_for_backbone(options, device)
    cases = parse_cases(options.cases)
    model = None if options.backbone == "bench" else options.backbone
    cells = narrow_grid(
        full_grid() if options.full else quick_grid(), cases, model, options.batch_size, options.repeats
    )
    on_cpu = torch.device(device).type == "cpu"
    dtype_name = options.dtype if options.dtype != "auto" else ("float32" if on_cpu else "bfloat16")
    cells = [_at_layers(cell, options.insert_layers) for cell in cells]
    # With the same layers for all, cells that differed in their layers alone are equal.
    cells = list({cell.key: cell for cell in cells}.values())
    return cells, _built_in_subjects(device, getattr(torch, dtype_name))


def _at_layers(cell: Cell, insert_layers: str) -> Cell:
    """Return the cell at `--insert-layers`; "quarters", and rows of several layers, keep the depths."""
    num_layers = BENCH_MODELS[cell.model].layers
    if insert_layers == "quarters":
        return cell
    depths = tuple(layer / num_layers for layer in parse_layers(insert_layers, num_layers))
    return cell if cell.case == "rows" else replace(cell, depths=depths)


def _built_in_subjects(device: str, dtype: torch.dtype) -> Callable[[Cell], Subject]:
    """Return a function that builds the subject of a cell on a built-in model.

    It reuses the last model, because the cells of one model follow each other.
    """
    last_model: dict[str, Any] = {}

    def subject_of(cell: Cell) -> Subject:
        if cell.model not in last_model:
            last_model.clear()
            last_model[cell.model] = build_bench_model(cell.model, device, dtype)
        model = last_model[cell.model]
        batch = make_batch(model, cell.texts(), cell.images(tokens_per_image(model)))
        return Subject(model, CostModel.from_model(model), batch, str(BENCH_MODELS[cell.model]))

    return subject_of


def _plan_for_backbone(options: BenchOptions, device: str) -> tuple[list[Cell], Callable[[Cell], Subject]]:
    """Return the cells on the user's backbone: rendered images with a question each."""
    cases = parse_cases(options.cases) or BACKBONE_CASES
    if {"ragged", "mixed"} & set(cases):
        raise ValueError(
            f"--cases {options.cases}: ragged and mixed batches exist for the built-in models only; with "
            f"--backbone {options.backbone} choose among {', '.join(BENCH_CASES[:-2])}"
        )
    backbone = load_backbone(options.backbone, device=device, dtype=options.dtype)
    batch = rendered_batch(backbone, options.batch_size or 8, options.seed)
    number = backbone.num_layers
    layers = None if options.insert_layers == "quarters" else parse_layers(options.insert_layers, number)
    depths = QUARTERS if layers is None else tuple(layer / number for layer in layers)
    remove_deep_insert(backbone.model)
    costs = CostModel.from_model(backbone.model, batch.inputs)
    width = backbone.model.config.get_text_config().hidden_size
    subject = Subject(backbone.model, costs, batch, f"{number} layers, width {width}")
    sizes = (options.backbone, batch.rows, batch.text, batch.multimodal)
    cells = [
        Cell(case, *sizes, PER_ROW if case == "rows" else depths, options.repeats or 9) for case in cases
    ]
    return cells, lambda cell: subject


def rendered_batch(backbone: Any, rows: int, seed: int) -> Batch:
    """Return images that the project renders, with a question each, as inputs of the backbone's processor."""
    from deepinsert.envs.data.instructions import load_instructions
    from deepinsert.envs.data.rendering import render_instructions
    from deepinsert.envs.prompts import prompts_from

    with tempfile.TemporaryDirectory() as folder:
        path = render_instructions(Path(folder), rows, seed, questions_per_image=1)
        prompts = [prompt for prompt in prompts_from(load_instructions(path), per="record") if prompt.images]
        inputs = generation_inputs(backbone, prompts[:rows])
    images = sum(len(prompt.images) for prompt in prompts[:rows])
    return describe_batch(backbone.model, inputs, images)


def measure_cells(
    cells: Sequence[Cell], subject_of: Callable[[Cell], Subject], out: Path
) -> list[dict[str, Any]]:
    """Measure every cell that `out` does not hold yet as a file from this machine.

    A cell for which the device has too little memory is left out, with a warning. Raises `ValueError` if no
    cell fits.
    """
    measured_cells = []
    totals = [sum(_relative_costs(cell, 16)) * cell.repeats for cell in cells]
    with cost_progress_bar("bench", sum(totals)) as advance:
        for cell, total in zip(cells, totals, strict=True):
            path = out / "cells" / f"{cell.key}.json"
            if read_cell(path, cell) is None:
                try:
                    advance_share = partial(_advance_share, advance, total)
                    write_json(path, measure_cell(cell, subject_of(cell), advance_share))
                except torch.OutOfMemoryError:
                    logger.warning("%s: left out, the device has too little memory", cell.key)
                    torch.cuda.empty_cache()
            else:
                advance(total)
            measured = read_cell(path, cell)
            measured_cells += [] if measured is None else [measured]
    if not measured_cells:
        raise ValueError(f"nothing was measured: none of {len(cells)} cells fits the device; try fewer rows")
    return measured_cells


def _advance_share(advance: Callable[[float], None], total: float, share: float) -> None:
    advance(share * total)


def read_cell(path: Path, cell: Cell) -> dict[str, Any] | None:
    """Return a cell that was measured before on this machine with as many rounds; None without one."""
    if not path.is_file():
        return None
    measured: dict[str, Any] = json.loads(path.read_text("utf-8"))
    is_current = measured["machine"] == machine_facts() and measured["repeats"] == cell.repeats
    return measured if is_current else None


def measure_cell(
    cell: Cell, subject: Subject, advance: Callable[[float], None] = lambda share: None
) -> dict[str, Any]:
    """Measure one cell; `advance` is called with the share of the cell's work done since the last call.

    Returns the facts of the measurement, and `parts`: per part, one row for the stock model and one per
    layer, as `measured_cases.measure` returns them, with the ratio of eq. (5).
    """
    model, batch = subject.model, subject.batch
    num_layers = subject.costs.num_layers
    settings = cell.settings(num_layers)
    costs = _relative_costs(cell, num_layers)
    shares = [cost / (sum(costs) * cell.repeats) for cost in costs]
    parts = measure(
        cell.case, model, subject.costs, batch, settings, cell.repeats, lambda arm: advance(shares[arm])
    )
    text_config = model.config.get_text_config()
    for row in (row for rows in parts.values() for row in rows):
        row["eq5_ratio"] = eq5_ratio(text_config, num_layers, batch, row["insert_layer"])
        if "kv_cache_bytes" in row and cell.case == "prefill":
            row["kv_cache_bytes_formula"] = ideal.cache_bytes(subject.costs, batch, row["insert_layer"])
    return {
        "key": cell.key,
        "case": cell.case,
        "model": cell.model,
        "model_size": subject.size,
        "num_layers": num_layers,
        "rows": batch.rows,
        "text_tokens": batch.text,
        "multimodal_tokens": batch.multimodal,
        "images": batch.images,
        "repeats": cell.repeats,
        "attention": attention_of(text_config),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "machine": machine_facts(),
        "parts": parts,
    }


def eq5_ratio(config: Any, num_layers: int, batch: Batch, setting: Setting) -> float:
    """Return the FLOPs at a setting by the paper's eq. (5), as a share of those at insert layer 0.

    Args:
        config: the configuration of the text model.
        num_layers: N, the number of decoder layers.
        batch: the batch, whose numbers of tokens count.
        setting: the insert layers.
    """

    def flops(layer: int) -> float:
        width = config.hidden_size
        mlp = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", 4 * width)
        return eq5_flops(num_layers, width, mlp, batch.text, batch.multimodal, layer)

    return ideal.rows_mean(setting, flops) / flops(0)


def _relative_costs(cell: Cell, num_layers: int) -> list[float]:
    """Return rough FLOPs of a run of each arm, stock first, to estimate the time left."""
    settings: list[Setting] = [None, *cell.settings(num_layers)]
    size = BENCH_MODELS.get(cell.model, BENCH_MODELS["bench"])

    def flops(layer: int) -> float:
        scale = size.layers / num_layers
        return scale * eq5_flops(num_layers, size.width, size.mlp_width, cell.text, cell.multimodal, layer)

    forwards = FORWARDS_PER_RUN.get(cell.case, 1) * cell.rows
    return [forwards * ideal.rows_mean(setting, flops) for setting in settings]


def draw_and_describe(cells: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    """Draw the pictures of cells that were measured on one machine, and return the result."""
    prefills = [cell for cell in cells if cell["case"] == "prefill"]
    if prefills:
        draw_figure12(max(prefills, key=lambda cell: len(cell["parts"]["prefill"])), out / "figure12.png")
    draw_saving_kept(cells, out / "saving_kept.png")
    return {"cells": cells, "device": cells[0]["device"], "machine": cells[0]["machine"]}
