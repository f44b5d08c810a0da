"""What many tests share: the embedded backbone, and instructions rendered once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def tiny_backbone():
    """The backbone that comes with the package, on the CPU; tests leave its insert layer as it was."""
    from deepinsert.backbones import load_backbone

    return load_backbone("tiny", device="cpu")


@pytest.fixture(scope="session", params=["llava_next", "qwen2_5_vl"])
def small_backbone(request):
    """A small random model with its real processor: tiles and newlines; grids and 3-D positions."""
    from small_backbones import BUILDERS

    return BUILDERS[request.param]()


@pytest.fixture(scope="session")
def rendered_data(tmp_path_factory) -> Path:
    """`instructions.json` with its images beside it: a few dozen questions of every source."""
    from deepinsert.envs.data.rendering import render_instructions

    return render_instructions(tmp_path_factory.mktemp("rendered"), images=24, seed=1)
