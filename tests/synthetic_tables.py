"""Reward tables whose best policy is known, shared by the tests of training."""

from __future__ import annotations

import numpy as np

from deepinsert.envs.rewards.table import RewardTable

LAYERS = 8


def difficulty(rng, prompts):
    """Losses in nats that differ between prompts whatever the layer: what a policy must see through."""
    return rng.gamma(2.0, 0.4, size=(prompts, 1))


def constant_table(seed=0, prompts=400):
    """One layer, 5, is the best for every prompt, by 0.06 nats or more."""
    rng = np.random.default_rng(seed)
    cliff = 0.2 * np.maximum(0, np.arange(LAYERS) - 5)
    table = RewardTable.from_losses(difficulty(rng, prompts) + cliff, range(LAYERS), LAYERS)
    return table, rng.normal(size=(prompts, 16))


def clustered_table(seed=0, prompts=800, width=32):
    """Four kinds of prompt, told apart by their embeddings, bear layers up to 1, 3, 5 and 7."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(4, size=prompts)
    centres = rng.normal(size=(4, width))
    bears = np.array([1, 3, 5, 7])[kind, None]
    losses = difficulty(rng, prompts) + 0.2 * np.maximum(0, np.arange(LAYERS) - bears)
    losses += 0.01 * rng.random(losses.shape)
    images = [f"{index // 2}.png" for index in range(prompts)]
    table = RewardTable.from_losses(losses, range(LAYERS), LAYERS, image_keys=images)
    return table, centres[kind] + 0.7 * rng.normal(size=(prompts, width))


def graded_table(seed=0, prompts=2000, width=48, layers=12):
    """Losses rise slowly, then fast behind a layer that hangs smoothly on what is seen, as in real models.

    Two tanh units of a hidden state of four say where; a part of it, and noise, nothing foretells.
    """
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(prompts, 4))
    observations = hidden @ rng.normal(size=(4, width)) / 2 + 0.3 * rng.normal(size=(prompts, width))
    bears = 0.45 + 0.25 * np.tanh(1.5 * hidden[:, 0]) + 0.15 * np.tanh(2 * hidden[:, 1])
    bears = layers * (bears + 0.03 * rng.normal(size=prompts))
    depth = np.arange(layers)
    slope = 0.1 * np.exp(0.4 * hidden[:, 2:3])
    losses = difficulty(rng, prompts) + slope * depth / layers
    losses += 0.15 * np.maximum(0, depth - bears[:, None]) ** 1.2 + 0.02 * rng.random(losses.shape)
    images = [f"{index // 3}.png" for index in range(prompts)]
    return RewardTable.from_losses(losses, range(layers), layers, image_keys=images), observations


def structureless_table(seed=0, prompts=1600):
    """Layer 3 is the best on average; what else differs between prompts, nothing in them foretells."""
    rng = np.random.default_rng(seed)
    losses = difficulty(rng, prompts) + 0.15 * np.maximum(0, np.arange(LAYERS) - 3)
    losses += 0.06 * rng.normal(size=losses.shape)
    return RewardTable.from_losses(losses, range(LAYERS), LAYERS), rng.normal(size=(prompts, 16))
