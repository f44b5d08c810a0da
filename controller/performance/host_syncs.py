"""Lists the operations of a prefill that make the host wait for the device, and the lines that call them.

A wait costs nothing on a CPU and stalls a GPU's queue. The operations are observed when they are dispatched,
so a run on a CPU shows where a GPU would wait; on a GPU the profiler counts the waits themselves too.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from deepinsert.backbones import deep_insert, remove_deep_insert

from .measured_cases import forward_arguments
from .sample_batches import Batch

WAITING = ("aten::nonzero", "aten::equal", "aten::masked_select")
"""Operations of which the host must know the result, or the size of the result."""

EVENTS = (
    "aten::item",
    "aten::nonzero",
    "aten::_local_scalar_dense",
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "Memcpy DtoH",
    "Memcpy HtoD",
)
"""Events of the profiler that are counted, by the beginning of their names."""

Calls = Counter[tuple[str, str]]
"""Number of calls by operation and calling line."""


class _WaitingOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Counts operations that make the host wait."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        to_host = name == "aten::_to_copy" and args[0].is_cuda and _device(kwargs) == "cpu"
        by_mask = name == "aten::index" and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING or to_host or by_mask:
            self.calls[(name, _caller())] += 1
        return func(*args, **(kwargs or {}))


class _ReadValues(TorchFunctionMode):
    """Counts tensors that are read as Python values, which on a CPU needs no operation of its own."""

    reading = (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__int__)

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.reading:
            self.calls[(func.__name__, _caller())] += 1
        return func(*args, **(kwargs or {}))


def _device(kwargs: Mapping[str, Any] | None) -> str | None:
    device = (kwargs or {}).get("device")
    return None if device is None else torch.device(device).type


def _caller() -> str:
    """Return the innermost calling line outside torch and this file, such as `mechanism/rows.py:66`."""
    package = str(Path(torch.__file__).parent)
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(package) and frame.filename != __file__:
            return f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}"
    return "?"


def find_syncs(model: Any, batch: Batch, insert_layer: int | None) -> dict[str, Any]:
    """List the waits of one prefill after a warm-up; the model is stock afterwards.

    Args:
        model: a model that can have an insert layer.
        batch: the batch to prefill.
        insert_layer: the insert layer; None is the stock model.

    Returns:
        `insert_layer`; `operations`, a list of operation, line and number of times; `events`, counts of the
        profiler's events by name.
    """
    if insert_layer is None:
        remove_deep_insert(model)
    else:
        deep_insert(model, insert_layer)
    arguments = {**batch.inputs, **forward_arguments(model)}
    activities = [ProfilerActivity.CPU]
    if model.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    calls: Calls = Counter()
    try:
        with torch.inference_mode():
            model(**arguments)
            with profile(activities=activities) as profiler:
                model(**arguments)
            with _WaitingOperations(calls), _ReadValues(calls):
                model(**arguments)
    finally:
        remove_deep_insert(model)
    events: Counter[str] = Counter()
    for event in profiler.key_averages():
        for name in EVENTS:
            if event.key.startswith(name):
                events[name] += event.count
    operations = [
        {"operation": name, "line": line, "times": times} for (name, line), times in calls.most_common()
    ]
    return {"insert_layer": insert_layer, "operations": operations, "events": dict(events)}
