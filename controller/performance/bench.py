"""`deepinsert bench`: time and memory by insert layer beside the untouched stock model, cell by cell.

Without a backbone, a LLaVA with random weights that is large enough for arithmetic to dominate; with one,
that model on rendered images. Each finished cell is a file, so that the same command continues.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deepinsert.backbones import CostModel, eq5_flops, load_backbone, remove_deep_insert
from deepinsert.backbones.compat.transformers import attention_of
from deepinsert.controller.answers.batched import generation_inputs
from deepinsert.controller.option_checks import BENCH_CASES, check, parse_cases, parse_layers
from deepinsert.controller.options import BenchOptions
from deepinsert.controller.runs.folder import (
    machine,
    progress_by_cost,
    read_result,
    start_run,
    write_json,
    write_result,
)

from . import ideal_ratios as ideal
from .grids import PER_ROW, QUARTERS, Cell, full_grid, narrowed, quick_grid
from .ideal_ratios import Setting
from .measured_cases import measure
from .performance_pictures import figure12, saving_kept
from .performance_tables import terminal
from .random_models import BENCH_MODELS, build_bench_model
from .sample_batches import Batch, describe, make_batch, tokens_per_image

OWN_CASES = ("prefill", "decode", "rows")  # of a user's backbone, where no case is named
PASSES = {
    "train-full": 3,
    "train-lora": 2,
    "decode": 1.5,
}  # a case in forwards, for the time left


@dataclass(frozen=True)
class Subject:
    """What is measured: a stock model in eval mode, what it costs, and a batch for it."""

    model: Any
    costs: CostModel
    batch: Batch
    size: str
    """The model's size in words."""


def run(options: BenchOptions) -> dict[str, Any]:
    """Measure the cells; write `cells/*.json`, `figure12.png`, `saving_kept.png` and `result.json`.

    A finished run is not repeated. Raises `ValueError` where the folder holds another run or an option
    cannot be used.
    """
    check(options)
    out = start_run(options)
    if (out / "result.json").is_file():
        print(f"{out} is finished; nothing to do", file=sys.stderr)
        result = read_result(out)
    else:
        with threads(options.threads):
            cells, prepare = plan(options)
            result = finish(out, measure_cells(cells, prepare, out))
    print(terminal(result))
    return result


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """So many torch threads for a while; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def plan(options: BenchOptions) -> tuple[list[Cell], Callable[[Cell], Subject]]:
    """The cells to measure, and what gives the subject of each."""
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.backbone not in BENCH_MODELS:
        return _own_plan(options, device)
    cases = parse_cases(options.cases)
    model = None if options.backbone == "bench" else options.backbone
    cells = narrowed(
        full_grid() if options.full else quick_grid(), cases, model, options.batch_size, options.repeats
    )
    on_cpu = torch.device(device).type == "cpu"
    name = options.dtype if options.dtype != "auto" else ("float32" if on_cpu else "bfloat16")
    chosen = {size.model: parse_layers_or_none(options.insert_layers, size.model) for size in cells}
    cells = [_at_layers(cell, chosen[cell.model], BENCH_MODELS[cell.model].layers) for cell in cells]
    # Cells that differed in their layers alone are one where layers are given.
    cells = list({cell.key: cell for cell in cells}.values())
    return cells, _built_in(device, getattr(torch, name))


def parse_layers_or_none(text: str, model: str) -> tuple[int, ...] | None:
    """`--insert-layers` for a built-in model; None for the depths of each cell."""
    return None if text == "quarters" else parse_layers(text, BENCH_MODELS[model].layers)


def _at_layers(cell: Cell, layers: Sequence[int] | None, num_layers: int) -> Cell:
    """The cell at the layers asked for, if any; rows of several layers stay as they are."""
    if layers is None or cell.case == "rows":
        return cell
    depths = tuple(layer / num_layers for layer in layers)
    return Cell(cell.case, cell.model, cell.rows, cell.text, cell.multimodal, depths, cell.repeats)


def _built_in(device: str, dtype: torch.dtype) -> Callable[[Cell], Subject]:
    """Subjects on the built-in models; a model is kept for the cells that follow on it."""
    kept: dict[str, Any] = {}

    def prepare(cell: Cell) -> Subject:
        if cell.model not in kept:
            kept.clear()
            kept[cell.model] = build_bench_model(cell.model, device, dtype)
        model = kept[cell.model]
        batch = make_batch(model, cell.texts(), cell.images(tokens_per_image(model)))
        return Subject(model, CostModel.from_model(model), batch, str(BENCH_MODELS[cell.model]))

    return prepare


def _own_plan(options: BenchOptions, device: str) -> tuple[list[Cell], Callable[[Cell], Subject]]:
    """Cells on the user's backbone: rendered images with a question each."""
    cases = parse_cases(options.cases) or OWN_CASES
    if {"ragged", "mixed"} & set(cases):
        raise ValueError(
            f"--cases {options.cases}: ragged and mixed batches are made for the built-in models only; with "
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
    """Images that the project draws, with a question each, as the backbone's processor makes them inputs."""
    from deepinsert.envs.data.instructions import load_instructions
    from deepinsert.envs.data.rendering import render_instructions
    from deepinsert.envs.prompts import prompts_from

    with tempfile.TemporaryDirectory() as folder:
        path = render_instructions(Path(folder), rows, seed, questions_per_image=1)
        prompts = [prompt for prompt in prompts_from(load_instructions(path), per="record") if prompt.images]
        inputs = generation_inputs(backbone, prompts[:rows])
    images = sum(len(prompt.images) for prompt in prompts[:rows])
    return describe(backbone.model, inputs, images)


def measure_cells(
    cells: Sequence[Cell], prepare: Callable[[Cell], Subject], out: Path
) -> list[dict[str, Any]]:
    """Measure every cell that `out` does not hold yet, from this machine, as a file.

    A cell that the device has no memory for is left out, and said so on stderr. Raises `ValueError` where
    that leaves nothing.
    """
    found = []
    totals = [sum(_costs(cell, 16)) * cell.repeats for cell in cells]
    with progress_by_cost("bench", sum(totals)) as advance:
        for cell, total in zip(cells, totals, strict=True):
            path = out / "cells" / f"{cell.key}.json"
            if read_cell(path, cell) is None:
                try:
                    told = partial(_scaled, advance, total)
                    write_json(path, measure_cell(cell, prepare(cell), told))
                except torch.OutOfMemoryError:
                    print(f"\n{cell.key}: left out, the device has too little memory", file=sys.stderr)
                    torch.cuda.empty_cache()
            else:
                advance(total)
            done = read_cell(path, cell)
            found += [] if done is None else [done]
    if not found:
        raise ValueError(f"nothing was measured: none of {len(cells)} cells fits the device; try fewer rows")
    return found


def _scaled(advance: Callable[[float], None], total: float, share: float) -> None:
    advance(share * total)


def read_cell(path: Path, cell: Cell) -> dict[str, Any] | None:
    """A cell measured before on this very machine; None where it is to be measured."""
    if not path.is_file():
        return None
    done = json.loads(path.read_text("utf-8"))
    return done if done["machine"] == machine() and done["repeats"] == cell.repeats else None


def measure_cell(
    cell: Cell, subject: Subject, advance: Callable[[float], None] = lambda share: None
) -> dict[str, Any]:
    """Measure one cell; `advance` is told the share of the cell's work that has been done since.

    Returns what was measured on what, and `parts`: for each part a row for the stock model and each layer,
    as `performance.cases.measure` gives them, with eq. (5)'s ratio.
    """
    model, batch = subject.model, subject.batch
    number = subject.costs.num_layers
    settings = cell.settings(number)
    weights = _costs(cell, number)
    share = [weight / (sum(weights) * cell.repeats) for weight in weights]
    parts = measure(
        cell.case, model, subject.costs, batch, settings, cell.repeats, lambda arm: advance(share[arm])
    )
    text_config = model.config.get_text_config()
    for row in (row for rows in parts.values() for row in rows):
        row["eq5_ratio"] = eq5_ratio(text_config, number, batch, row["insert_layer"])
        if "kv_cache_bytes" in row and cell.case == "prefill":
            row["kv_cache_bytes_formula"] = ideal.cache_bytes(subject.costs, batch, row["insert_layer"])
    return {
        "key": cell.key,
        "case": cell.case,
        "model": cell.model,
        "model_size": subject.size,
        "num_layers": number,
        "rows": batch.rows,
        "text_tokens": batch.text,
        "multimodal_tokens": batch.multimodal,
        "images": batch.images,
        "repeats": cell.repeats,
        "attention": attention_of(text_config),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "machine": machine(),
        "parts": parts,
    }


def eq5_ratio(config: Any, num_layers: int, batch: Batch, setting: Setting) -> float:
    """The paper's eq. (5) at a setting against insert layer 0."""

    def flops(layer: int) -> float:
        width = config.hidden_size
        mlp = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", 4 * width)
        return eq5_flops(num_layers, width, mlp, batch.text, batch.multimodal, layer)

    return ideal.rows_mean(setting, flops) / flops(0)


def _costs(cell: Cell, num_layers: int) -> list[float]:
    """Roughly what a run of each arm costs, stock first: for the time left."""
    settings: list[Setting] = [None, *cell.settings(num_layers)]
    size = BENCH_MODELS.get(cell.model, BENCH_MODELS["bench"])

    def flops(layer: int) -> float:
        scale = size.layers / num_layers
        return scale * eq5_flops(num_layers, size.width, size.mlp_width, cell.text, cell.multimodal, layer)

    passes = PASSES.get(cell.case, 1) * cell.rows
    return [passes * ideal.rows_mean(setting, flops) for setting in settings]


def finish(out: Path, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Draw the pictures and write the result of cells measured on one machine."""
    prefills = [cell for cell in cells if cell["case"] == "prefill"]
    if prefills:
        figure12(max(prefills, key=lambda cell: len(cell["parts"]["prefill"])), out / "figure12.png")
    saving_kept(cells, out / "saving_kept.png")
    result: Mapping[str, Any] = {
        "cells": cells,
        "device": cells[0]["device"],
        "machine": cells[0]["machine"],
    }
    return write_result(out, dict(result))
