"""Fixtures for all tests: the embedded backbone, small random backbones, and rendered instructions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def tiny_backbone():
    """The backbone in the package, on the CPU; tests must leave its insert layer as it is."""
    from deepinsert.backbones import load_backbone

    return load_backbone("tiny", device="cpu")


@pytest.fixture(scope="session", params=["llava_next", "qwen2_5_vl"])
def small_backbone(request):
    """A small random model with a real processor: one with image tiles, one with grids and 3-D positions."""
    from small_backbones import BUILDERS

    return BUILDERS[request.param]()


@pytest.fixture(scope="session")
def rendered_data(tmp_path_factory) -> Path:
    """Path of an `instructions.json` beside its images: a few dozen questions of every source."""
    from deepinsert.envs.data.rendering import render_instructions

    return render_instructions(tmp_path_factory.mktemp("rendered"), images=24, seed=1)
