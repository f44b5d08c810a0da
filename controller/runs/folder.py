"""Run folders: `config.json` and `result.json` of a command in the folder that `--out` names.

Importing this module does not import torch, so that the command line starts quickly.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepinsert.controller.options import RunOptions

from .atomic_files import to_json, write_json
from .machine import machine_facts, package_versions

FREE_OPTIONS = (
    "out",
    "device",
    "shard",
    "shard_prompts",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
)
"""Options that may change when a run continues: they decide where or how fast it runs, or what follows it."""


def command_of(options: Any) -> str:
    """Return the command that `options` belong to: `"train-policy"` for `TrainPolicyOptions`."""
    name = type(options).__name__.removesuffix("Options")
    return re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower()


def start_run(options: RunOptions | Any, growing: Sequence[str] = ()) -> Path:
    """Make the run folder `options.out`, write its `config.json`, and return the folder.

    `config.json` holds the command, the resolved options, package versions, the seed and the machine. A
    folder that already holds a run of the same command with the same options is continued. `growing` names
    options that may differ from those in the folder, because the command extends its run.

    Raises:
        ValueError: the folder holds another run; results of two runs must not mix.
    """
    out = Path(options.out)
    config = {
        "command": command_of(options),
        "options": to_json(dataclasses.asdict(options)),
        "seed": getattr(options, "seed", None),
        "versions": package_versions(),
        "machine": machine_facts(),
    }
    previous = read_config(out)
    if previous is not None and any(entry.name != "config.json" for entry in out.iterdir()):
        differences = run_differences(previous, config, growing)
        if differences:
            raise ValueError(
                f"--out {out}: the folder holds another run ({'; '.join(differences)}). "
                "Choose another --out, or remove that folder."
            )
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", config)
    return out


def same_run(options: RunOptions | Any, free: Sequence[str] = ()) -> bool:
    """Return whether `options.out` holds a run of this command with these options, finished or not.

    The options named in `free` may differ.
    """
    previous = read_config(Path(options.out))
    config = {"command": command_of(options), "options": to_json(dataclasses.asdict(options))}
    return previous is not None and not run_differences(previous, config, free)


def run_differences(
    previous: dict[str, Any], config: dict[str, Any], growing: Sequence[str] = ()
) -> list[str]:
    """Return how the run of `config` differs from the run of `previous`, for a message; empty for one run."""
    if previous.get("command") != config["command"]:
        return [f"command {previous.get('command')}, now {config['command']}"]
    before, now = previous.get("options", {}), config["options"]
    return [
        f"--{name.replace('_', '-')} {before.get(name)}, now {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if name not in (*FREE_OPTIONS, *growing) and before.get(name) != now.get(name)
    ]


def read_config(out: str | Path) -> dict[str, Any] | None:
    """Return the `config.json` of a run folder, or None if it has none."""
    path = Path(out) / "config.json"
    if not path.is_file():
        return None
    config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return config


def write_result(out: str | Path, result: dict[str, Any]) -> dict[str, Any]:
    """Write `result.json`, the last file of a run: if it exists, the run has finished. Return `result`."""
    write_json(Path(out) / "result.json", result)
    return result


def read_result(out: str | Path) -> dict[str, Any]:
    """Return the `result.json` of a run folder.

    Raises:
        FileNotFoundError: the run has not finished.
    """
    path = Path(out) / "result.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {out} is not the folder of a finished run")
    result: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return result
