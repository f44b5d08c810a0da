"""One pair of models a family for the whole session: stock, and the same weights with an insert layer."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from zoo import FAMILIES, Family

from backbones import deep_insert, set_insert_layer

DEEPLY = ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen2_audio"]
"""Families that are tried in every shape of use."""


@pytest.fixture(scope="session", params=DEEPLY)
def family(request) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="session")
def stock(family):
    return family.model()


@pytest.fixture(scope="session")
def inserted_once(stock):
    return deep_insert(copy.deepcopy(stock), 0)


@pytest.fixture
def inserted(inserted_once):
    """The family's model with an insert layer of 0; what a test sets does not outlive it."""
    yield inserted_once
    set_insert_layer(inserted_once, 0)
