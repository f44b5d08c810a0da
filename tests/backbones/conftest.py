"""One pair of models per family for the whole session: stock, and the same weights with an insert layer."""

from __future__ import annotations

import copy
from collections import defaultdict
from pathlib import Path

import pytest
from models_page import page
from zoo import FAMILIES, REFUSED, Family

from deepinsert.backbones import deep_insert, set_insert_layer

THOROUGH_FAMILIES = ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen2_audio"]
"""The families that are tried in every shape of use."""


@pytest.fixture(scope="session", params=THOROUGH_FAMILIES)
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
    """Yield the family's model with insert layer 0, and reset the layer that the test sets."""
    yield inserted_once
    set_insert_layer(inserted_once, 0)


def pytest_addoption(parser):
    parser.addoption(
        "--models-page", type=Path, help="write the outcomes of test_models.py as a page to this file"
    )


OUTCOMES: dict[str, dict[str, str]] = defaultdict(dict)
"""Outcomes by family or refused model type, and by test."""


def pytest_runtest_logreport(report):
    """Collect the outcomes, in the one process that gets the reports of all processes."""
    file, _, test = report.nodeid.partition("::")
    name, _, parameters = test.removeprefix("test_").rstrip("]").partition("[")
    subjects = [each for each in (*FAMILIES, *REFUSED) if f"{parameters}-".startswith(f"{each}-")]
    if file.endswith("test_models.py") and subjects:
        outcomes = OUTCOMES[max(subjects, key=len)]
        if report.failed or name not in outcomes:
            outcomes[name] = report.outcome


def pytest_sessionfinish(session):
    target = session.config.getoption("--models-page", None)
    if target is not None:
        target.write_text(page(OUTCOMES))
