"""Predicted times of prefill and decode on a device, by the roofline model.

Each kernel takes as long as its FLOPs at the device's peak, or as its bytes at the memory's bandwidth,
whichever is longer (Williams, Waterman and Patterson, 2009). Kernels are the encoder, each decoder layer's
weight matrices, each layer's attention, and the output head. Launching kernels, moving inputs, sampling and
time lost on the host are not included: the ratios are reliable, and good kernels come near the times.
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
"""Assumed share of peak FLOP/s and of bandwidth that all kernels reach; it cancels in ratios."""


@dataclass(frozen=True)
class Device:
    """The peak figures of one device."""

    name: str
    peak_flops: Mapping[str, float]
    """FLOP/s of dense matrix products by precision (`"bfloat16"`), with sums in float32 and no sparsity."""
    bandwidth: float
    """Bytes per second from the device's memory."""
    memory: float
    """Bytes of memory."""

    def peak(self, dtype: torch.dtype) -> float:
        """Return the peak FLOP/s in `dtype`. Raises `ValueError` if the device has no figure for it."""
        name = str(dtype).removeprefix("torch.")
        if name not in self.peak_flops:
            precisions = ", ".join(self.peak_flops)
            raise ValueError(f"{self.name} has no figure for {name}: choose the dtype among {precisions}")
        return self.peak_flops[name]


def _gpu(name: str, tera_half: float, tera_single: float, gb_per_s: float, gb: float, *more: str) -> Device:
    """Make a device from its data sheet: TFLOP/s in float16 (and `more`) and in float32, GB/s, GB."""
    halves = dict.fromkeys(("float16", *more), tera_half * 1e12)
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
"""Dense tensor-core figures; float32 without TF32, as is torch's default. Sources, all by NVIDIA: "A100
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
"""Other names of devices, such as torch's, without spaces and NVIDIA's prefixes."""


def device_named(name: str) -> Device:
    """Return a device by name, in any spelling (`"H100"`, `"NVIDIA H100 80GB HBM3"`, `"rtx4090"`).

    `"cpu"` measures this machine. Raises `ValueError` for an unknown name; the message lists all names.
    """
    plain = re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())
    if plain == "cpu":
        return measure_cpu()
    names = {re.sub(r"[^a-z0-9]", "", device.lower()): device for device in DEVICES} | ALIASES
    if plain not in names:
        raise ValueError(
            f"device {name!r} is not in the table: choose {', '.join(DEVICES)} or cpu, "
            "or give its peak, bandwidth and memory"
        )
    return DEVICES[names[plain]]


def measure_cpu(size: int = 1024, repeats: int = 5) -> Device:
    """Measure this machine with torch's current threads, by a float32 matrix product and a copy.

    The figures are reached ones and no peaks, so an efficiency of 1 fits them. It takes about a second.
    """
    square = torch.randn(size, size)
    large = torch.zeros(32 * 2**20)
    target = torch.empty_like(large)
    product = _shortest_time(lambda: torch.mm(square, square), repeats)
    copy = _shortest_time(lambda: target.copy_(large), repeats)
    memory = (
        float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if hasattr(os, "sysconf") else 0.0
    )
    return Device("cpu", {"float32": 2 * size**3 / product}, 2 * large.nbytes / copy, memory)


def _shortest_time(work: Callable[[], object], repeats: int) -> float:
    """Return the shortest time of `work` in seconds, after one run that is not timed."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


@dataclass(frozen=True)
class Phase:
    """Predicted costs of a batch's prefill, or of decoding one token per row."""

    ms: float
    flops: float
    bytes: float
    """Bytes of weights, keys, values and activations that go through the device's memory."""
    compute_share: float
    """Share of the time in kernels that are limited by FLOPs; the rest is limited by memory."""
    intensity: float = field(init=False)
    """FLOPs per byte."""
    bound: Literal["compute", "memory"] = field(init=False)
    """The limit of most of the time."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "intensity", self.flops / self.bytes)
        object.__setattr__(self, "bound", "compute" if self.compute_share >= 0.5 else "memory")


@dataclass(frozen=True)
class Prediction:
    """Predicted time and memory at one insert layer; ratios are to insert layer 0, the stock model."""

    insert_layer: int
    prefill: Phase
    decode: Phase
    """The forward that decodes one token per row, right after the prompt."""
    weight_bytes: int
    kv_cache_bytes: int
    """Bytes of the whole batch's cache after the prefill."""
    memory_bytes: int
    """Bytes of weights and KV cache; activations, which add some per cent, are not counted."""
    fits: bool
    """Whether `memory_bytes` is within the device's memory."""
    prefill_ratio: float
    decode_ratio: float
    flops_ratio: float
    kv_cache_ratio: float


Kernel = tuple[float, float]
"""FLOPs and bytes of one kernel."""


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
    """Predict time and memory on `device`; the head is applied to the last position, as in `generate`.

    Args:
        costs: costs of the model; a configuration is enough (`CostModel.from_config`).
        device: peak figures of the device.
        text: T, text tokens per row.
        multimodal: M, multimodal tokens per row.
        insert_layer: L.
        batch: rows.
        images: images or clips per row.
        efficiency: share of the peak figures that kernels reach.

    Raises:
        ValueError: the device has no figure for the precision, `efficiency` is outside (0, 1], `batch` is
            below 1, or the prompt or the layer is impossible (see `CostModel`).
    """
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency {efficiency}: give a share above 0 and at most 1")
    if batch < 1:
        raise ValueError(f"batch {batch}: give at least 1 row")
    cache_bytes = batch * costs.kv_cache_bytes(text, multimodal, insert_layer)
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
        kv_cache_bytes=cache_bytes,
        memory_bytes=costs.weight_bytes + cache_bytes,
        fits=costs.weight_bytes + cache_bytes <= device.memory,
        prefill_ratio=prefill.ms / phases[0][0].ms,
        decode_ratio=decode.ms / phases[0][1].ms,
        flops_ratio=prefill.flops / phases[0][0].flops,
        kv_cache_ratio=cache_bytes / (batch * costs.kv_cache_bytes(text, multimodal, 0)),
    )


def _phase(kernels: list[Kernel], costs: CostModel, device: Device, efficiency: float) -> Phase:
    """Sum the times of kernels that run one after the other, each limited by FLOPs or by memory."""
    peak = device.peak(costs.dtype)
    times = [(flops / peak, size / device.bandwidth) for flops, size in kernels]
    total = sum(max(pair) for pair in times)
    compute_bound = sum(compute for compute, memory in times if compute >= memory)
    flops, size = map(sum, zip(*kernels, strict=True))
    return Phase(1000 * total / efficiency, flops, size, compute_bound / total)


def _prefill(
    costs: CostModel, text: int, multimodal: int, insert_layer: int, batch: int, images: int
) -> list[Kernel]:
    """Return the kernels of the forward over whole prompts."""
    positions = batch * costs.head_positions(text + multimodal, 1)
    kernels: list[Kernel] = [(positions * costs.head, costs.head_bytes)]
    if multimodal:
        kernels.append((batch * costs.encoder.flops(multimodal, images), costs.encoder_bytes))
    for index, (layer, traffic) in enumerate(zip(costs.layers, costs.traffic, strict=True)):
        tokens = text if index < insert_layer else text + multimodal
        if not tokens:
            continue
        rows = batch * tokens
        matrix_bytes = traffic.weights_read(rows) + rows * traffic.row_width * costs.element_bytes
        kernels.append((rows * layer.per_row, matrix_bytes))
        width = traffic.attention_width + costs.key_value_widths[index]
        kernels.append((rows * tokens * layer.per_pair, rows * width * costs.element_bytes))
    return kernels


def _decode(costs: CostModel, text: int, multimodal: int, insert_layer: int, batch: int) -> list[Kernel]:
    """Return the kernels of the forward that gives each row its next token."""
    kernels: list[Kernel] = [(batch * costs.head, costs.head_bytes)]
    cached_tokens = costs.cached_tokens(text, multimodal, insert_layer)
    for layer, traffic, width, cached in zip(
        costs.layers, costs.traffic, costs.key_value_widths, cached_tokens, strict=True
    ):
        matrix_bytes = traffic.weights_read(batch) + batch * traffic.row_width * costs.element_bytes
        kernels.append((batch * layer.per_row, matrix_bytes))
        numbers = (cached + 1) * width + traffic.attention_width
        kernels.append((batch * (cached + 1) * layer.per_pair, batch * numbers * costs.element_bytes))
    return kernels
