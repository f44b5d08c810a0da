"""Fixtures of the environment tests: a random reward table, its observations, and environments on them."""

from __future__ import annotations

import gymnasium
import pytest
from small_table import random_observations, random_table

from deepinsert.envs import load_instructions, prompts_from
from deepinsert.envs.registration import ENV_ID


@pytest.fixture
def table():
    return random_table()


@pytest.fixture
def observations():
    return random_observations()


@pytest.fixture
def env(table, observations):
    return gymnasium.make(ENV_ID, table=table, observations=observations, skip_weight=0.5)


@pytest.fixture
def ranged_env(table, observations):
    return gymnasium.make(ENV_ID, table=table, observations=observations, skip_weight=(0.2, 1.2))


@pytest.fixture(scope="session")
def six_prompts(rendered_data):
    return prompts_from(load_instructions(rendered_data))[:6]
