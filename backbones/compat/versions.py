"""Which versions of transformers and torch this package is known to work with.

`TRIED_TRANSFORMERS` and `TRIED_TORCH` are those of the runs that wrote `docs/versions.md`. Any other version
in the range is tried by `self_check` before the first insertion.
"""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

OLDEST_TRANSFORMERS = "5.0.0"
OLDEST_TORCH = "2.6.0"

TRIED_TRANSFORMERS = (
    "5.0.0",
    "5.4.0",
    "5.8.1",
    "5.12.1",
    "5.16.1",
    "5.20.2",
    "5.22.2",
    "5.23.0",
    "5.24.0",
)
TRIED_TORCH = ("2.13.0", "2.15.0")


def installed(library: str) -> str:
    """The version of an installed library, without the part that names a build, such as `+cpu`."""
    return version(library).partition("+")[0]


def is_tried() -> bool:
    """Whether the installed versions are among those that the tests have run with."""
    return installed("transformers") in TRIED_TRANSFORMERS and installed("torch") in TRIED_TORCH


def known_range() -> str:
    """The versions that work, for an error message."""
    return (
        f"transformers {TRIED_TRANSFORMERS[0]} to {TRIED_TRANSFORMERS[-1]} with torch "
        f"{' or '.join(TRIED_TORCH)} are known to work"
    )


def check_not_too_old() -> None:
    """Raise `ImportError` where a library is older than all that this package supports."""
    for library, oldest in (("transformers", OLDEST_TRANSFORMERS), ("torch", OLDEST_TORCH)):
        found = installed(library)
        if Version(found) < Version(oldest):
            raise ImportError(
                f"DeepInsert needs {library} {oldest} or later, and this is {found}: "
                f"pip install --upgrade {library}"
            )
