"""Public names of a package that load their module only when they are first used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_attributes(package: str, module_of: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a function that serves as the `__getattr__` of `package`.

    `module_of` maps each public name to the module that defines it, relative to the package. The function
    raises `AttributeError` for any other name.
    """

    def load(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f".{module_of[name]}", package), name)

    return load
