"""Measure LLaVA-1.5-7B and 13B, LLaVA-NeXT-7B and Qwen2.5-VL-7B on a GPU by insert layer: `make bench-gpu`.

The models are built from their published configurations with random weights, because time does not depend on
the weights; nothing is downloaded. Prefill, decoding, peak memory and a LoRA step are compared with the stock
model for each attention kernel, beside the paper's ratios and this project's goals. `--profile` lists the
operations that make the host wait.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from deepinsert.backbones import CostModel
from deepinsert.controller.option_checks import check, parse_layers
from deepinsert.controller.options import RunOptions
from deepinsert.controller.performance.bench import Subject, draw_and_describe, measure_cells
from deepinsert.controller.performance.grids import Cell
from deepinsert.controller.performance.host_syncs import find_syncs
from deepinsert.controller.performance.performance_tables import describe_setup, figures_table, result_text
from deepinsert.controller.performance.published_configurations import PUBLISHED_MODELS
from deepinsert.controller.performance.sample_batches import make_batch, tokens_per_image
from deepinsert.controller.runs.atomic_files import write_json
from deepinsert.controller.runs.command import run_command

PAPER = {4: 0.928, 8: 0.881, 12: 0.836}
"""Prefill time of LLaVA-1.5-7B by insert layer, as a share of stock, on the paper's A100."""
GOALS = {0: 1.01, 8: 0.81, 12: 0.73}
"""Largest such shares that meet this project's goals."""
PAPER_MODEL = "llava-1.5-7b"
HEADINGS = (
    "model", "attention", "rows", "text + multimodal", "layer", "prefill ms", "ratio", "FLOPs", "kept",
    "paper", "goal", "decode ms", "ratio", "LoRA step ms", "ratio", "peak GB", "KV MB",
)  # fmt: skip


logger = logging.getLogger("deepinsert")


@dataclass(kw_only=True)
class GpuOptions(RunOptions):
    """Measure published models with random weights by insert layer on a GPU."""

    out: Path = Path("runs/bench-gpu")
    """Run folder; the same command continues a run that it finds there."""
    models: tuple[str, ...] = tuple(PUBLISHED_MODELS)
    """Models to build."""
    insert_layers: str = "0,4,8,12,16"
    """Insert layers to measure beside the stock model."""
    text: tuple[int, ...] = (64, 128)
    """Text tokens per row; each row has one image."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Rows of a prefill; decoding and the LoRA step are measured with the first."""
    attention: tuple[str, ...] = ("sdpa", "flash_attention_2")
    """Attention kernels."""
    repeats: int = 20
    """Rounds; each runs the stock model and every layer once."""
    device: str = "cuda"
    """Device to measure on; cpu is for trying the code with --scale tiny."""
    scale: Literal["published", "tiny"] = "published"
    """Size of the models; tiny replaces the published numbers by small ones."""
    profile: bool = False
    """List the operations that make the host wait in one prefill, at layers 0 and 8, and measure nothing."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure or profile; a user's mistake ends with status 2 and a message of one line."""
    options = tyro.cli(GpuOptions, description=__doc__, args=arguments)
    try:
        run(options)
    except ValueError as error:
        print(f"benchmarks/gpu.py: error: {error}", file=sys.stderr)
        sys.exit(2)


def run(options: GpuOptions) -> dict[str, Any]:
    """Write cells, pictures and `result.json` (or `host_syncs.json`) and print the table."""
    check(options)
    check_machine(options)
    if options.profile:
        return profile_syncs(options)

    def measure_all(out: Path) -> dict[str, Any]:
        return draw_and_describe(measure_cells(cells_of(options), published_subjects(options), out), out)

    result = run_command(options, measure_all, result_text)
    print(f"\n{table(result['cells'])}\nMeasured on {describe_setup(result)}.")
    if options.scale == "tiny":
        print("Tiny models: these times say nothing about the published ones.")
    return result


def check_machine(options: GpuOptions) -> None:
    """Raise `ValueError` for an unknown model, or for a device that this machine does not have."""
    unknown = [name for name in options.models if name not in PUBLISHED_MODELS]
    if unknown:
        raise ValueError(f"--models {unknown[0]}: unknown model; choose among {', '.join(PUBLISHED_MODELS)}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"--device {options.device}: torch finds no CUDA device here; run this on a machine with one, or "
            "try the code with --device cpu --scale tiny"
        )
    if options.device == "cpu" and options.scale == "published":
        raise ValueError("--device cpu: models of 7 billion weights need a GPU; add --scale tiny")


def runnable_kernels(options: GpuOptions) -> list[str]:
    """Return the attention kernels that can run on this machine, and warn of the others."""
    runnable = []
    for name in options.attention:
        if name.startswith("flash") and importlib.util.find_spec("flash_attn") is None:
            logger.warning("%s: left out, the package flash_attn is not installed", name)
        else:
            runnable.append(name)
    if not runnable:
        raise ValueError(f"--attention {', '.join(options.attention)}: none can run here; add sdpa")
    return runnable


def cells_of(options: GpuOptions) -> list[Cell]:
    """Return all cells, grouped by model so that each model is built once."""
    cells = []
    kernels = runnable_kernels(options)
    for name in options.models:
        outline = PUBLISHED_MODELS[name].build("meta", torch.bfloat16, options.scale)
        num_layers, image = outline.config.get_text_config().num_hidden_layers, tokens_per_image(outline)
        depths = tuple(layer / num_layers for layer in parse_layers(options.insert_layers, num_layers))
        for kernel in kernels:
            for text in options.text:
                sizes = [(rows, text, image, depths, options.repeats, kernel) for rows in options.batch_sizes]
                cells += [Cell("prefill", name, *size) for size in sizes]
                cells += [Cell(case, name, *sizes[0]) for case in ("decode", "train-lora")]
    return cells


def published_subjects(options: GpuOptions) -> Callable[[Cell], Subject]:
    """Return a function that builds the subject of a cell on a published model.

    It reuses the last model, because the cells of one model follow each other.
    """
    last_model: dict[str, Any] = {}
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16

    def subject_of(cell: Cell) -> Subject:
        if cell.model not in last_model:
            last_model.clear()
            last_model[cell.model] = PUBLISHED_MODELS[cell.model].build(options.device, dtype, options.scale)
        model = last_model[cell.model]
        model.set_attn_implementation(cell.attention)
        batch = make_batch(model, cell.texts(), cell.images(tokens_per_image(model)))
        weights = sum(weight.numel() for weight in model.parameters())
        size = f"{weights / 1e9:.2f} billion weights, {options.scale} scale"
        return Subject(model, CostModel.from_model(model), batch, size)

    return subject_of


def table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return one line per prefill and layer, with decoding, LoRA step and memory of the same arm."""
    lines = []
    for cell in cells:
        if cell["case"] != "prefill":
            continue
        for index, row in enumerate(cell["parts"]["prefill"]):
            decode = _matching_row(cells, cell, "decode", index)
            step = _matching_row(cells, cell, "step", index)
            lines.append(_line(cell, row, decode, step))
    return figures_table(HEADINGS, lines)


def _matching_row(
    cells: Sequence[Mapping[str, Any]], cell: Mapping[str, Any], part: str, index: int
) -> dict[str, Any]:
    """Return the row of arm `index` in another part, of the same model, kernel and batch; {} without one."""
    same_fields = ("model", "attention", "rows", "text_tokens", "multimodal_tokens")
    for other in cells:
        if part in other["parts"] and all(other[name] == cell[name] for name in same_fields):
            row: dict[str, Any] = other["parts"][part][index]
            return row
    return {}


def _line(
    cell: Mapping[str, Any], row: Mapping[str, Any], decode: Mapping[str, Any], step: Mapping[str, Any]
) -> tuple[str, ...]:
    """Return the cells below `HEADINGS` for one arm: its prefill `row`, its decoding and its LoRA step."""
    layer = row["insert_layer"]
    is_papers = cell["model"] == PAPER_MODEL
    goal = GOALS.get(layer) if is_papers or layer == 0 else None
    goal_state = "" if goal is None else f"<= {goal}: {'met' if row['time_ratio'] <= goal else 'missed'}"
    peak = max(part.get("peak_memory_bytes", 0) for part in (row, decode, step))
    return (
        cell["model"],
        cell["attention"],
        str(cell["rows"]),
        f"{cell['text_tokens']} + {cell['multimodal_tokens']}",
        "stock" if layer is None else str(layer),
        f"{row['ms']:.1f}",
        f"{row['time_ratio']:.3f}",
        f"{row['ideal_ratio']:.3f}",
        "" if row["saving_kept"] is None else f"{row['saving_kept']:.0%}",
        f"{PAPER[layer]:.3f}" if is_papers and layer in PAPER else "",
        goal_state,
        f"{decode['ms']:.1f}" if decode else "",
        f"{decode['time_ratio']:.3f}" if decode else "",
        f"{step['ms']:.1f}" if step else "",
        f"{step['time_ratio']:.3f}" if step else "",
        f"{peak / 1e9:.1f}" if peak else "",
        f"{row['kv_cache_bytes'] / 1e6:.0f}",
    )


def profile_syncs(options: GpuOptions) -> dict[str, Any]:
    """Print, and write to `host_syncs.json`, the operations of one prefill that make the host wait."""
    syncs_by_model: dict[str, Any] = {}
    subject_of = published_subjects(options)
    kernel = runnable_kernels(options)[0]
    for name in options.models:
        subject = subject_of(
            Cell("prefill", name, options.batch_sizes[0], options.text[0], 1, (0.0,), 1, kernel)
        )
        syncs_by_model[name] = [find_syncs(subject.model, subject.batch, layer) for layer in (None, 0, 8)]
        for syncs in syncs_by_model[name]:
            layer = "stock" if syncs["insert_layer"] is None else f"insert layer {syncs['insert_layer']}"
            print(f"{name}, {layer}: events of the profiler {syncs['events']}")
            for entry in syncs["operations"]:
                print(f"  {entry['times']:4d} x {entry['operation']:28} {entry['line']}")
    write_json(Path(options.out) / "host_syncs.json", syncs_by_model)
    return syncs_by_model


if __name__ == "__main__":
    main()
