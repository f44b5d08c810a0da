"""All model families that the suite tries, and the model types that must be refused.

Each module of this package holds similar families, as `FAMILIES`, and model types that cannot work, as
`REFUSED`.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from .family import (
    LAYERS,
    PLACEHOLDER,
    TEXT,
    VISION,
    WORDS,
    Family,
    Media,
    Refused,
    assert_close,
    forget_the_last_batch,
    logits_of,
    skip_here,
    skip_where_stock_differs,
    skipping_what_is_missing,
)

_MODULES = [
    import_module(f"{__name__}.{module.name}")
    for module in pkgutil.iter_modules(__path__)
    if module.name != "family"
]

FAMILIES: dict[str, Family] = {
    family.name: family for module in _MODULES for family in getattr(module, "FAMILIES", [])
}
REFUSED: dict[str, Refused] = {
    refused.name: refused for module in _MODULES for refused in getattr(module, "REFUSED", [])
}

__all__ = [
    "FAMILIES",
    "LAYERS",
    "PLACEHOLDER",
    "REFUSED",
    "TEXT",
    "VISION",
    "WORDS",
    "Family",
    "Media",
    "Refused",
    "assert_close",
    "forget_the_last_batch",
    "logits_of",
    "skip_here",
    "skip_where_stock_differs",
    "skipping_what_is_missing",
]
