"""Reward tables with a known best policy, shared by the tests of training."""

from __future__ import annotations

import numpy as np

from deepinsert.envs.rewards.table import RewardTable

LAYERS = 8


def difficulty(rng, prompts):
    """Return losses (P, 1) in nats that differ between prompts but not between layers."""
    return rng.gamma(2.0, 0.4, size=(prompts, 1))


def constant_table(seed=0, prompts=400):
    """Return a table on which layer 5 is the best for every prompt, by 0.06 nats or more."""
    rng = np.random.default_rng(seed)
    cliff = 0.2 * np.maximum(0, np.arange(LAYERS) - 5)
    table = RewardTable.from_losses(difficulty(rng, prompts) + cliff, range(LAYERS), LAYERS)
    return table, rng.normal(size=(prompts, 16))


def clustered_table(seed=0, prompts=800, width=32):
    """Return a table of four kinds of prompt with limits 1, 3, 5 and 7; observations show the kind."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(4, size=prompts)
    centres = rng.normal(size=(4, width))
    limits = np.array([1, 3, 5, 7])[kind, None]
    losses = difficulty(rng, prompts) + 0.2 * np.maximum(0, np.arange(LAYERS) - limits)
    losses += 0.01 * rng.random(losses.shape)
    images = [f"{index // 2}.png" for index in range(prompts)]
    table = RewardTable.from_losses(losses, range(LAYERS), LAYERS, image_keys=images)
    return table, centres[kind] + 0.7 * rng.normal(size=(prompts, width))


def graded_table(seed=0, prompts=2000, width=48, layers=12):
    """Return a table like a real model's: losses rise slowly, then fast beyond a limit layer.

    The limit depends on two of four hidden numbers through tanh, the slope on a third, and the observations
    are linear in all four. A part of the limit is noise, which nothing predicts.
    """
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(prompts, 4))
    observations = hidden @ rng.normal(size=(4, width)) / 2 + 0.3 * rng.normal(size=(prompts, width))
    limits = 0.45 + 0.25 * np.tanh(1.5 * hidden[:, 0]) + 0.15 * np.tanh(2 * hidden[:, 1])
    limits = layers * (limits + 0.03 * rng.normal(size=prompts))
    depth = np.arange(layers)
    slope = 0.1 * np.exp(0.4 * hidden[:, 2:3])
    losses = difficulty(rng, prompts) + slope * depth / layers
    losses += 0.15 * np.maximum(0, depth - limits[:, None]) ** 1.2 + 0.02 * rng.random(losses.shape)
    images = [f"{index // 3}.png" for index in range(prompts)]
    return RewardTable.from_losses(losses, range(layers), layers, image_keys=images), observations


def structureless_table(seed=0, prompts=1600):
    """Return a table on which layer 3 is best on average and observations predict nothing."""
    rng = np.random.default_rng(seed)
    losses = difficulty(rng, prompts) + 0.15 * np.maximum(0, np.arange(LAYERS) - 3)
    losses += 0.06 * rng.normal(size=losses.shape)
    return RewardTable.from_losses(losses, range(LAYERS), LAYERS), rng.normal(size=(prompts, 16))
