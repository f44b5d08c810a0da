"""LLaVA-1.5-7B and 13B, LLaVA-NeXT-7B and Qwen2.5-VL-7B on a GPU, by insert layer: `make bench-gpu`.

Built from their published configurations with random weights, which time does not depend on, so nothing is
downloaded. Prefill, decoding, peak memory and a LoRA step against the stock model, for each kernel of
attention, beside the paper's ratios and this project's goals. `--profile` lists what makes the host wait.
"""

from __future__ import annotations

import importlib.util
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
from deepinsert.controller.performance.bench import Subject, finish, measure_cells
from deepinsert.controller.performance.grids import Cell
from deepinsert.controller.performance.host_syncs import find_syncs
from deepinsert.controller.performance.performance_tables import measured_on, terminal, text_table
from deepinsert.controller.performance.published_configurations import PUBLISHED_MODELS
from deepinsert.controller.performance.sample_batches import make_batch, tokens_per_image
from deepinsert.controller.runs.atomic_files import write_json
from deepinsert.controller.runs.folder import read_result, start_run

PAPER = {4: 0.928, 8: 0.881, 12: 0.836}
"""Prefill of LLaVA-1.5-7B by insert layer against stock, on the paper's A100."""
GOALS = {0: 1.01, 8: 0.81, 12: 0.73}
"""The same, at most, in this project."""
PAPER_MODEL = "llava-1.5-7b"
HEADINGS = (
    "model", "attention", "rows", "text + multimodal", "layer", "prefill ms", "ratio", "FLOPs", "kept",
    "paper", "goal", "decode ms", "ratio", "LoRA step ms", "ratio", "peak GB", "KV MB",
)  # fmt: skip


@dataclass(kw_only=True)
class GpuOptions(RunOptions):
    """Measure published models with random weights by insert layer on a GPU."""

    out: Path = Path("runs/bench-gpu")
    """Run folder; the same command again continues what it finds there."""
    models: tuple[str, ...] = tuple(PUBLISHED_MODELS)
    """Models to build."""
    insert_layers: str = "0,4,8,12,16"
    """Layers to measure beside the stock model."""
    text: tuple[int, ...] = (64, 128)
    """Text tokens of a row; each has one image."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Rows of a prefill; decoding and the LoRA step are measured with the first."""
    attention: tuple[str, ...] = ("sdpa", "flash_attention_2")
    """Kernels of attention."""
    repeats: int = 20
    """Rounds; each runs the stock model and every layer once."""
    device: str = "cuda"
    """Where; cpu is for trying the code with --scale tiny."""
    scale: Literal["published", "tiny"] = "published"
    """tiny puts small numbers in place of the published ones."""
    profile: bool = False
    """List what makes the host wait for the device in one prefill, at layers 0 and 8, and measure nothing."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure or profile; a mistake ends with status 2 and one line."""
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
    out = start_run(options)
    if (out / "result.json").is_file():
        result = read_result(out)
    else:
        result = finish(out, measure_cells(cells_of(options), published(options), out))
    print(terminal(result))
    print(f"\n{table(result['cells'])}\nMeasured on {measured_on(result)}.")
    if options.scale == "tiny":
        print("Tiny models: these times say nothing about the published ones.")
    return result


def check_machine(options: GpuOptions) -> None:
    """Raise `ValueError` for a model that is not known, or a device that is not here."""
    unknown = [name for name in options.models if name not in PUBLISHED_MODELS]
    if unknown:
        raise ValueError(f"--models {unknown[0]}: not known; choose among {', '.join(PUBLISHED_MODELS)}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"--device {options.device}: torch finds no CUDA device here; run this on a machine with one, or "
            "try the code with --device cpu --scale tiny"
        )
    if options.device == "cpu" and options.scale == "published":
        raise ValueError("--device cpu: models of 7 billion weights need a GPU; add --scale tiny")


def kernels(options: GpuOptions) -> list[str]:
    """The kernels of attention that can run here; those that cannot are named on stderr."""
    found = []
    for name in options.attention:
        missing = name.startswith("flash") and importlib.util.find_spec("flash_attn") is None
        if missing:
            print(f"{name}: left out, the package flash_attn is not installed", file=sys.stderr)
        else:
            found.append(name)
    if not found:
        raise ValueError(f"--attention {', '.join(options.attention)}: none can run here; add sdpa")
    return found


def cells_of(options: GpuOptions) -> list[Cell]:
    """Every cell, a model at a time, so that each is built once."""
    cells = []
    attentions = kernels(options)
    for name in options.models:
        config = PUBLISHED_MODELS[name].build("meta", torch.bfloat16, options.scale)
        number, image = config.config.get_text_config().num_hidden_layers, tokens_per_image(config)
        depths = tuple(layer / number for layer in parse_layers(options.insert_layers, number))
        for attention in attentions:
            for text in options.text:
                sizes = [
                    (rows, text, image, depths, options.repeats, attention) for rows in options.batch_sizes
                ]
                cells += [Cell("prefill", name, *size) for size in sizes]
                cells += [Cell(case, name, *sizes[0]) for case in ("decode", "train-lora")]
    return cells


def published(options: GpuOptions) -> Callable[[Cell], Subject]:
    """Builds the subject of a cell; a model is kept for the cells that follow on it."""
    kept: dict[str, Any] = {}
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16

    def prepare(cell: Cell) -> Subject:
        if cell.model not in kept:
            kept.clear()
            kept[cell.model] = PUBLISHED_MODELS[cell.model].build(options.device, dtype, options.scale)
        model = kept[cell.model]
        model.set_attn_implementation(cell.attention)
        batch = make_batch(model, cell.texts(), cell.images(tokens_per_image(model)))
        weights = sum(weight.numel() for weight in model.parameters())
        size = f"{weights / 1e9:.2f} billion weights, {options.scale} scale"
        return Subject(model, CostModel.from_model(model), batch, size)

    return prepare


def table(cells: Sequence[Mapping[str, Any]]) -> str:
    """A line for each prefill and layer, with the decoding, the LoRA step and the memory of the same arm."""
    lines = []
    for cell in cells:
        if cell["case"] != "prefill":
            continue
        for index, row in enumerate(cell["parts"]["prefill"]):
            lines.append(
                _line(cell, row, _beside(cells, cell, "decode", index), _beside(cells, cell, "step", index))
            )
    return text_table(HEADINGS, lines)


def _beside(cells: Sequence[Mapping[str, Any]], cell: Mapping[str, Any], part: str, index: int) -> Any:
    """The same arm's row of another part, of the cell with the same model, kernel and batch; {} without."""
    same = ("model", "attention", "rows", "text_tokens", "multimodal_tokens")
    for other in cells:
        if part in other["parts"] and all(other[name] == cell[name] for name in same):
            return other["parts"][part][index]
    return {}


def _line(cell: Mapping[str, Any], row: Mapping[str, Any], decode: Any, step: Any) -> tuple[str, ...]:
    layer = row["insert_layer"]
    is_papers = cell["model"] == PAPER_MODEL
    goal = GOALS.get(layer) if is_papers or layer == 0 else None
    judged = "" if goal is None else f"<= {goal}: {'met' if row['time_ratio'] <= goal else 'missed'}"
    peak = max((found.get("peak_memory_bytes", 0) for found in (row, decode, step)), default=0)
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
        judged,
        f"{decode['ms']:.1f}" if decode else "",
        f"{decode['time_ratio']:.3f}" if decode else "",
        f"{step['ms']:.1f}" if step else "",
        f"{step['time_ratio']:.3f}" if step else "",
        f"{peak / 1e9:.1f}" if peak else "",
        f"{row['kv_cache_bytes'] / 1e6:.0f}",
    )


def profile_syncs(options: GpuOptions) -> dict[str, Any]:
    """Print and write to `host_syncs.json` what makes the host wait in one prefill of each model."""
    found: dict[str, Any] = {}
    prepare = published(options)
    for name in options.models:
        cell = Cell(
            "prefill", name, options.batch_sizes[0], options.text[0], 1, (0.0,), 1, kernels(options)[0]
        )
        subject = prepare(cell)
        found[name] = [find_syncs(subject.model, subject.batch, layer) for layer in (None, 0, 8)]
        for syncs in found[name]:
            layer = "stock" if syncs["insert_layer"] is None else f"insert layer {syncs['insert_layer']}"
            print(f"{name}, {layer}: events of the profiler {syncs['events']}")
            for entry in syncs["operations"]:
                print(f"  {entry['times']:4d} x {entry['operation']:28} {entry['line']}")
    write_json(Path(options.out) / "host_syncs.json", found)
    return found


if __name__ == "__main__":
    main()
