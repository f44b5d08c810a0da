"""Run folders: what every command writes to `--out`, and how.

A file in a run folder is whole or absent: it is written beside its place, synced, and moved there. This
module imports torch only to describe the machine, so that the command line stays quick.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from deepinsert.controller.options import RunOptions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Item = TypeVar("Item")

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

# Options that change where or how fast a run goes, or what is done with it: it may continue with others.
FREE_OPTIONS = (
    "out",
    "device",
    "shard",
    "shard_prompts",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
)


def command_of(options: Any) -> str:
    """The command that `options` belongs to: `TrainPolicyOptions` is `"train-policy"`'s."""
    name = type(options).__name__.removesuffix("Options")
    return re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower()


def start_run(options: RunOptions | Any, growing: Sequence[str] = ()) -> Path:
    """Make the run folder `options.out` and write its `config.json`.

    `config.json` holds the command, the resolved options, package versions, the seed and the machine.
    A folder that already holds a run of the same command with the same options is continued; `ValueError`
    where it holds another run, since results of two different runs must not mix. A command whose run can be
    extended names the options that may differ as `growing`.
    """
    out = Path(options.out)
    config = {
        "command": command_of(options),
        "options": to_json(dataclasses.asdict(options)),
        "seed": getattr(options, "seed", None),
        "versions": versions(),
        "machine": machine(),
    }
    previous = read_config(out)
    if previous is not None and any(entry.name != "config.json" for entry in out.iterdir()):
        difference = differences(previous, config, growing)
        if difference:
            raise ValueError(
                f"--out {out}: the folder holds another run ({'; '.join(difference)}). "
                "Choose another --out, or remove that folder."
            )
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", config)
    return out


def same_run(options: RunOptions | Any) -> bool:
    """Whether `options.out` holds a run of this command with these options, finished or not."""
    previous = read_config(Path(options.out))
    config = {"command": command_of(options), "options": to_json(dataclasses.asdict(options))}
    return previous is not None and not differences(previous, config)


def differences(previous: dict[str, Any], config: dict[str, Any], growing: Sequence[str] = ()) -> list[str]:
    """What tells the run of `previous` from that of `config`, for a message; empty for the same run."""
    if previous.get("command") != config["command"]:
        return [f"command {previous.get('command')}, now {config['command']}"]
    before, now = previous.get("options", {}), config["options"]
    return [
        f"--{name.replace('_', '-')} {before.get(name)}, now {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if name not in (*FREE_OPTIONS, *growing) and before.get(name) != now.get(name)
    ]


def read_config(out: str | Path) -> dict[str, Any] | None:
    """The `config.json` of a run folder; None where there is none."""
    path = Path(out) / "config.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def write_result(out: str | Path, result: dict[str, Any]) -> dict[str, Any]:
    """Write `result.json`, the last file of a run: where it is there, the run has finished."""
    write_json(Path(out) / "result.json", result)
    return result


def read_result(out: str | Path) -> dict[str, Any]:
    """The `result.json` of a finished run. Raises `FileNotFoundError` where the run has not finished."""
    path = Path(out) / "result.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {out} is not the folder of a finished run")
    return json.loads(path.read_text("utf-8"))


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as JSON, atomically. NumPy values, paths, tuples and dataclasses are converted; NaN and
    infinities, which JSON does not have, become null."""
    text = json.dumps(to_json(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


def save_figure(figure: Figure, path: str | Path, dpi: int = 100) -> Path:
    """Save a matplotlib figure atomically and close it. Returns `path`."""
    import matplotlib.pyplot as plt

    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.lstrip(".") or "png", dpi=dpi)
    plt.close(figure)
    return Path(path)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, synced to disk, when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes on other machines that share the folder may have this one's number.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any) -> Any:
    """`value` in JSON's own types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if hasattr(value, "tolist"):  # NumPy arrays and scalars, tensors
        return to_json(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    return str(value)


def progress(iterable: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Go through `iterable` with a bar on stderr that shows what is done and the time left.

    Where stderr is a file, a line every ten seconds is enough.
    """
    seconds = 0.2 if sys.stderr.isatty() else 10.0
    yield from tqdm(
        iterable, desc=label, total=total, file=sys.stderr, mininterval=seconds, dynamic_ncols=True
    )


@contextmanager
def progress_by_cost(label: str, total: float) -> Iterator[Callable[[float], None]]:
    """A bar on stderr for work whose parts cost unlike much; gives what is told the cost of each part done.

    The time left is in proportion to the cost left.
    """
    seconds = 0.5 if sys.stderr.isatty() else 10.0
    form = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
    with tqdm(total=total, desc=label, file=sys.stderr, mininterval=seconds, bar_format=form) as bar:
        yield lambda cost: bar.update(min(cost, total - bar.n)) and None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """CPU model, cores this process may use, RAM in GiB, torch's threads, GPU (None without one)."""
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


def describe_machine(description: dict[str, Any]) -> str:
    """`machine()` in one line, for tables and pictures."""
    cpu = f"{description['cpu']}, {description['cores']} cores, {description['ram_gib']} GiB RAM"
    return f"{description['gpu']}, {cpu}" if description.get("gpu") else cpu


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine() or "unknown"


def ram_bytes() -> int:
    """Physical memory in bytes; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0
