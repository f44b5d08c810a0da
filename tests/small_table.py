"""A small random reward table with observations, for tests of the environments."""

from __future__ import annotations

import numpy as np

from deepinsert.envs import RewardTable

PROMPTS, LAYERS, WIDTH = 12, (0, 2, 4, 7), 6


def random_table() -> RewardTable:
    rng = np.random.default_rng(5)
    flops = rng.uniform(50, 100, (PROMPTS, len(LAYERS)))
    flops[:, 0] = 100
    return RewardTable.from_losses(rng.uniform(0, 3, (PROMPTS, len(LAYERS))), LAYERS, 8, flops=flops)


def random_observations() -> np.ndarray:
    return np.random.default_rng(6).normal(size=(PROMPTS, WIDTH))
