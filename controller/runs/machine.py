"""The machine and the package versions that a run's results depend on.

Importing this module does not import torch, so that the command line starts quickly.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGES = (
    "deepinsert",
    "torch",
    "transformers",
    "stable-baselines3",
    "gymnasium",
    "peft",
    "accelerate",
    "numpy",
    "safetensors",
    "pillow",
)


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def machine_facts() -> dict[str, Any]:
    """Return CPU model, cores of this process, RAM in GiB, torch threads, and GPU (None without one)."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": cores,
        "ram_gib": round(ram_bytes() / 2**30, 1),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def describe_machine(facts: Mapping[str, Any]) -> str:
    """Describe the machine of `machine_facts` in one line, for tables and pictures."""
    cpu = f"{facts['cpu']}, {facts['cores']} cores, {facts['ram_gib']} GiB RAM"
    return f"{facts['gpu']}, {cpu}" if facts.get("gpu") else cpu


def cpu_model() -> str:
    """Return the processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # the system is not Linux
    return platform.processor() or platform.machine() or "unknown"


def ram_bytes() -> int:
    """Return the physical memory in bytes, or 0 if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0
