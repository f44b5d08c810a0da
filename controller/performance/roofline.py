"""What to expect of a device before it is bought: times of prefill and decode by the roofline model.

Each kernel takes as long as its FLOPs at the device's peak, or as its bytes at the memory's bandwidth,
whichever is longer (Williams, Waterman and Patterson, 2009). Kernels are the encoder, each decoder layer's
weight matrices, each layer's attention, and the output head. Launching them, moving inputs and sampling are
not in it, nor is time lost on the host: ratios are what to trust, times are what good kernels come near.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from deepinsert.backbones.costs.cost_model import CostModel

EFFICIENCY = 0.5
"""Share of peak FLOP/s and of bandwidth that kernels are taken to reach, all alike: it cancels in ratios."""


@dataclass(frozen=True)
class Device:
    """What one device can do at most."""

    name: str
    peak_flops: Mapping[str, float]
    """FLOP/s of dense matrix products by precision (`"bfloat16"`), sums in float32, no sparsity."""
    bandwidth: float
    """Bytes/s from the device's memory."""
    memory: float
    """Bytes of memory."""

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s in `dtype`. Raises `ValueError` where the device has no figure for it."""
        name = str(dtype).removeprefix("torch.")
        if name not in self.peak_flops:
            known = ", ".join(self.peak_flops)
            raise ValueError(f"{self.name} has no figure for {name}: choose the dtype among {known}")
        return self.peak_flops[name]


def _gpu(name: str, tera_half: float, tera_single: float, gb_per_s: float, gb: float, *more: str) -> Device:
    """A GPU by its data sheet: TFLOP/s in float16 (and `more`) and in float32, GB/s, GB."""
    halves = {precision: tera_half * 1e12 for precision in ("float16", *more)}
    return Device(name, halves | {"float32": tera_single * 1e12}, gb_per_s * 1e9, gb * 1e9)


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _gpu("A100-40", 312, 19.5, 1555, 40, "bfloat16"),
        _gpu("A100-80", 312, 19.5, 2039, 80, "bfloat16"),
        _gpu("H100", 989.4, 66.9, 3350, 80, "bfloat16"),
        _gpu("H200", 989.4, 66.9, 4800, 141, "bfloat16"),
        _gpu("L40S", 362.05, 91.6, 864, 48, "bfloat16"),
        _gpu("RTX 4090", 165.2, 82.6, 1008, 24, "bfloat16"),
        _gpu("T4", 65, 8.1, 320, 16),
    )
}
"""Dense tensor-core figures, float32 without TF32 as torch has it by default. Sources, all by NVIDIA: "A100
Tensor Core GPU" data sheet (SXM4); "H100 Tensor Core GPU" and "H200 Tensor Core GPU" data sheets (SXM5; half
of the figures with sparsity); "L40S" data sheet; "Ada GPU Architecture" whitepaper, appendix A (RTX 4090,
float32 sums); "T4 Tensor Core GPU" data sheet (no bfloat16 tensor cores)."""

ALIASES = {
    "a100": "A100-80",
    "a100sxm440gb": "A100-40",
    "a100sxm480gb": "A100-80",
    "a10040gb": "A100-40",
    "a10080gb": "A100-80",
    "h100sxm": "H100",
    "h10080gbhbm3": "H100",
    "h200sxm": "H200",
    "4090": "RTX 4090",
}
"""Other names, such as torch gives them; NVIDIA's own prefixes are dropped first."""


def device_named(name: str) -> Device:
    """The device of that name, whatever its spelling (`"H100"`, `"NVIDIA H100 80GB HBM3"`, `"rtx4090"`).

    `"cpu"` measures this machine. Raises `ValueError` with the known names for any other.
    """
    plain = re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())
    if plain == "cpu":
        return measure_cpu()
    known = {re.sub(r"[^a-z0-9]", "", device.lower()): device for device in DEVICES} | ALIASES
    if plain not in known:
        raise ValueError(
            f"device {name!r} is not in the table: choose {', '.join(DEVICES)} or cpu, "
            "or give its peak, bandwidth and memory"
        )
    return DEVICES[known[plain]]


def measure_cpu(size: int = 1024, repeats: int = 5) -> Device:
    """This machine, as torch reaches it with its present threads, by a float32 matrix product and a copy.

    What is measured is what can be reached, so that an efficiency of 1 fits it. Takes about a second.
    """
    square = torch.randn(size, size)
    large = torch.zeros(32 * 2**20)
    target = torch.empty_like(large)
    product = _best(lambda: torch.mm(square, square), repeats)
    copy = _best(lambda: target.copy_(large), repeats)
    memory = (
        float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if hasattr(os, "sysconf") else 0.0
    )
    return Device("cpu", {"float32": 2 * size**3 / product}, 2 * large.nbytes / copy, memory)


def _best(work: Callable[[], object], repeats: int) -> float:
    """The shortest time in seconds, after one run that is not timed."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


@dataclass(frozen=True)
class Phase:
    """A prefill, or the decoding of one token, of a batch."""

    ms: float
    flops: float
    bytes: float
    """Weights, keys and values, and activations that go through the device's memory."""
    compute_share: float
    """Share of the time in kernels that FLOPs limit; the rest waits for memory."""
    intensity: float = field(init=False)
    """FLOPs for each byte."""
    bound: Literal["compute", "memory"] = field(init=False)
    """What limits most of the time."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "intensity", self.flops / self.bytes)
        object.__setattr__(self, "bound", "compute" if self.compute_share >= 0.5 else "memory")


@dataclass(frozen=True)
class Prediction:
    """What `predict` expects at one insert layer; ratios are against insert layer 0, the stock model."""

    insert_layer: int
    prefill: Phase
    decode: Phase
    """One token for every row, right after the prompt."""
    weight_bytes: int
    kv_cache_bytes: int
    """Of the whole batch, after the prefill."""
    memory_bytes: int
    """Weights and KV cache; activations, some per cent more, are not counted."""
    fits: bool
    """Whether `memory_bytes` is within the device's memory."""
    prefill_ratio: float
    decode_ratio: float
    flops_ratio: float
    kv_cache_ratio: float


Kernel = tuple[float, float]
"""FLOPs and bytes."""


def predict(
    costs: CostModel,
    device: Device,
    text: int,
    multimodal: int,
    insert_layer: int,
    batch: int = 1,
    images: int = 1,
    efficiency: float = EFFICIENCY,
) -> Prediction:
    """Time and memory on `device` of a batch whose rows have `text` + `multimodal` tokens each.

    `images` is the number of images or clips of a row. `costs` may come from a configuration alone
    (`CostModel.from_config`). The head is applied to the last position, as `generate` does.

    Raises `ValueError` for a precision that the device has no figure for, for an `efficiency` outside (0, 1]
    or a `batch` below 1, and as `CostModel` does.
    """
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency {efficiency}: give a share above 0 and at most 1")
    if batch < 1:
        raise ValueError(f"batch {batch}: give at least 1 row")
    cached = batch * costs.kv_cache_bytes(text, multimodal, insert_layer)
    phases = {}
    for layer in (0, insert_layer):
        prefill = _phase(_prefill(costs, text, multimodal, layer, batch, images), costs, device, efficiency)
        decode = _phase(_decode(costs, text, multimodal, layer, batch), costs, device, efficiency)
        phases[layer] = prefill, decode
    prefill, decode = phases[insert_layer]
    return Prediction(
        insert_layer=insert_layer,
        prefill=prefill,
        decode=decode,
        weight_bytes=costs.weight_bytes,
        kv_cache_bytes=cached,
        memory_bytes=costs.weight_bytes + cached,
        fits=costs.weight_bytes + cached <= device.memory,
        prefill_ratio=prefill.ms / phases[0][0].ms,
        decode_ratio=decode.ms / phases[0][1].ms,
        flops_ratio=prefill.flops / phases[0][0].flops,
        kv_cache_ratio=cached / (batch * costs.kv_cache_bytes(text, multimodal, 0)),
    )


def _phase(kernels: list[Kernel], costs: CostModel, device: Device, efficiency: float) -> Phase:
    peak = device.peak(costs.dtype)
    times = [(flops / peak, moved / device.bandwidth) for flops, moved in kernels]
    total = sum(max(pair) for pair in times)
    computing = sum(compute for compute, memory in times if compute >= memory)
    flops, moved = map(sum, zip(*kernels, strict=True))
    return Phase(1000 * total / efficiency, flops, moved, computing / total)


def _prefill(
    costs: CostModel, text: int, multimodal: int, insert_layer: int, batch: int, images: int
) -> list[Kernel]:
    """The kernels of a whole prompt's forward."""
    positions = batch * costs.head_positions(text + multimodal, 1)
    kernels: list[Kernel] = [(positions * costs.head, costs.head_bytes)]
    if multimodal:
        kernels.append((batch * costs.encoder.flops(multimodal, images), costs.encoder_bytes))
    for index, (layer, traffic) in enumerate(zip(costs.layers, costs.traffic, strict=True)):
        tokens = text if index < insert_layer else text + multimodal
        if not tokens:
            continue
        rows = batch * tokens
        moved = traffic.weights_read(rows) + rows * traffic.row_width * costs.element_bytes
        kernels.append((rows * layer.per_row, moved))
        width = traffic.attention_width + costs.key_value_widths[index]
        kernels.append((rows * tokens * layer.per_pair, rows * width * costs.element_bytes))
    return kernels


def _decode(costs: CostModel, text: int, multimodal: int, insert_layer: int, batch: int) -> list[Kernel]:
    """The kernels of the forward that gives each row its next token."""
    kernels: list[Kernel] = [(batch * costs.head, costs.head_bytes)]
    held = costs.cached_tokens(text, multimodal, insert_layer)
    for layer, traffic, width, keys in zip(
        costs.layers, costs.traffic, costs.key_value_widths, held, strict=True
    ):
        moved = traffic.weights_read(batch) + batch * traffic.row_width * costs.element_bytes
        kernels.append((batch * layer.per_row, moved))
        numbers = (keys + 1) * width + traffic.attention_width
        kernels.append((batch * (keys + 1) * layer.per_pair, batch * numbers * costs.element_bytes))
    return kernels
