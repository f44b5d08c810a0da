"""The versions of transformers and torch that this package has been tested with.

`TRIED_TRANSFORMERS` and `TRIED_TORCH` are the versions in the runs that wrote `docs/versions.md`. Any other
version in the range is checked by `mechanism/self_check.py` before the first insertion.
"""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

OLDEST_TRANSFORMERS = "5.0.0"
OLDEST_TORCH = "2.6.0"

TRIED_TRANSFORMERS = (
    "5.0.0",
    "5.1.0",
    "5.2.0",
    "5.3.0",
    "5.4.0",
    "5.5.4",
    "5.6.2",
    "5.7.0",
    "5.8.1",
    "5.9.0",
    "5.10.4",
    "5.11.0",
    "5.12.1",
    "5.13.1",
    "5.14.1",
    "5.15.1",
    "5.16.1",
    "5.17.0",
    "5.18.0",
    "5.19.0",
    "5.20.2",
    "5.21.1",
    "5.22.2",
    "5.23.0",
    "5.24.0",
)
TRIED_TORCH = ("2.13.0", "2.15.0")


def installed(library: str) -> str:
    """Return the version of an installed library, without the part that names a build, such as `+cpu`."""
    return version(library).partition("+")[0]


def is_tried() -> bool:
    """Whether the installed versions are among those that the tests have run with."""
    return installed("transformers") in TRIED_TRANSFORMERS and installed("torch") in TRIED_TORCH


def tried_range() -> str:
    """Return a sentence on the versions that work, for an error message."""
    return (
        f"transformers {TRIED_TRANSFORMERS[0]} to {TRIED_TRANSFORMERS[-1]} with torch "
        f"{' or '.join(TRIED_TORCH)} are known to work"
    )


def check_not_too_old() -> None:
    """Raise `ImportError` if a library is older than the oldest version that this package supports."""
    for library, oldest in (("transformers", OLDEST_TRANSFORMERS), ("torch", OLDEST_TORCH)):
        installed_version = installed(library)
        if Version(installed_version) < Version(oldest):
            raise ImportError(
                f"DeepInsert needs {library} {oldest} or later, and this is {installed_version}: "
                f"pip install --upgrade {library}"
            )
