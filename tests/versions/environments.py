"""Installs other versions of transformers, each in a folder that goes first on the path.

A folder holds only the packages that the version needs and the environment does not have: transformers
itself, and for older versions `huggingface_hub`, `tokenizers` and an HTTP client.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv-versions"


def environment(version: str) -> dict[str, str]:
    """Return the environment variables of a process that imports this version; install it if needed."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed(version)), str(ROOT)])}


def installed(version: str) -> Path:
    """Return the folder of transformers `version` and its requirements; pip fills it the first time."""
    target = FOLDER / f"transformers-{version}"
    if not (target / "complete").exists():
        _install(target, [f"transformers=={version}"])
        while missing := sorted(set(_unsatisfied(target))):
            _install(target, missing)
        (target / "complete").touch()
    return target


def _install(target: Path, requirements: list[str]) -> None:
    """Install the requirements in the folder `target` with pip, without their dependencies."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-compile", "--upgrade", "--target", str(target)]
    # No constraints: those of the environment do not hold for other versions.
    subprocess.run([*pip, *options, *requirements], check=True, cwd=ROOT)


def _unsatisfied(target: Path) -> Iterator[str]:
    """Return requirements of the packages in `target` that neither it nor the environment satisfies."""
    in_target = _by_name(distributions(path=[str(target)]))
    available = _by_name(distributions()) | in_target
    for distribution in in_target.values():
        for text in distribution.requires or []:
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            match = available.get(canonicalize_name(requirement.name))
            if match is None or not requirement.specifier.contains(match.version, prereleases=True):
                yield f"{requirement.name}{requirement.specifier}"


def _by_name(packages: Iterable[Distribution]) -> dict[str, Distribution]:
    """Return the installed packages by their canonical name."""
    return {canonicalize_name(package.metadata["Name"]): package for package in packages}
