"""A policy over a range of skip weights on a table whose figures can be checked."""

import dataclasses

import numpy as np
import pytest
import torch

from deepinsert.controller.learning.train_policy import train_policy
from deepinsert.controller.policy.layer_policy import LayerPolicy
from deepinsert.controller.policy.table_means import fields_of_table
from deepinsert.envs.observations import Normaliser, Observation
from deepinsert.envs.rewards.table import RewardTable
from deepinsert.envs.skip_weights import SkipWeights

LAYERS = 8


def graded_table(seed, prompts=600, noise=0.01, observed=16, costs=(0.05, 0.2, 0.5, 1.2)):
    """Return a table and observations of four kinds of prompt, whose loss rises by `cost * depth ** 2`.

    The best depth at skip weight λ is λ / (2 cost). Two questions share an image.
    """
    rng = np.random.default_rng(seed)
    kind = rng.integers(len(costs), size=prompts)
    depth = np.arange(LAYERS) / LAYERS
    losses = rng.gamma(2.0, 0.4, size=(prompts, 1)) + np.array(costs)[kind, None] * depth**2
    losses += noise * rng.random(losses.shape)
    flops = 100 * (1 - 0.9 * depth) + np.zeros((prompts, 1))
    images = [f"{seed}-{index // 2}.png" for index in range(prompts)]
    centres = np.random.default_rng(99).normal(size=(len(costs), observed))
    observations = centres[kind] + 0.3 * rng.normal(size=(prompts, observed))
    table = RewardTable.from_losses(losses, range(LAYERS), LAYERS, flops=flops, image_keys=images)
    return table, observations


def fit_policy(table, observations, skip_weights, backbone=("none", "none"), steps=400):
    """Train a policy by the exact gradient of the mean reward of `table`, at skip weights from the range."""
    normaliser = Normaliser.fit(observations)
    rng = np.random.default_rng(0)
    values = normaliser(observations)
    width = values.shape[1] + skip_weights.features_of([skip_weights.low]).shape[1]
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, width), (len(table.insert_layers), 64)]
    layers = [
        (torch.randn(shape, generator=generator) / shape[1] ** 0.5, torch.zeros(shape[0])) for shape in shapes
    ]
    parameters = [part.requires_grad_() for layer in layers for part in layer]
    optimiser = torch.optim.Adam(parameters, lr=0.01)
    losses, bonus = torch.tensor(table.losses), torch.tensor(table.bonus("depth"))
    for _ in range(steps):
        weights = skip_weights.draw(rng, len(table))
        inputs = torch.from_numpy(np.concatenate([values, skip_weights.features_of(weights)], axis=1))
        hidden = torch.tanh(inputs @ layers[0][0].T + layers[0][1])
        probabilities = torch.softmax(hidden @ layers[1][0].T + layers[1][1], dim=1)
        rewards = -losses + torch.tensor(weights)[:, None] * bonus
        loss = -(probabilities * (rewards - rewards.mean(dim=1, keepdim=True))).sum(dim=1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return LayerPolicy(
        **fields_of_table(table, skip_weights.high, "depth"),
        skip_weights=skip_weights,
        algorithm="full-info",
        observation=Observation(),
        normaliser=normaliser,
        network=tuple((weight.detach(), bias.detach()) for weight, bias in layers),
        backbone_name=backbone[0],
        backbone_fingerprint=backbone[1],
        seed=0,
    )


@pytest.fixture(scope="session")
def save_policy():
    """Return a function that saves a policy which chooses many different layers for some prompts."""

    def save(backbone, prompts, folder):
        losses = np.random.default_rng(0).gamma(2.0, 0.4, size=(len(prompts), LAYERS))
        policy = train_policy(
            RewardTable.from_losses(losses, "all", LAYERS),
            Observation()(backbone, prompts),
            skip_weights=(0.0, 4.0),
            steps=2048,
            backbone=(backbone.name, backbone.fingerprint),
        )
        *body, (weight, bias) = policy.network
        dataclasses.replace(policy, network=(*body, (100 * weight, bias))).save(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def make_graded_table():
    """Return `graded_table`, for tests that need another seed or size."""
    return graded_table


@pytest.fixture(scope="session")
def fit():
    """Return `fit_policy`, for tests with their own table."""
    return fit_policy


@pytest.fixture(scope="session")
def graded_policy():
    """A policy for skip weights 0 to 1, trained on the graded table of seed 0, with a frontier on seed 1."""
    return fit_policy(*graded_table(0), SkipWeights(0.0, 1.0)).with_frontier(*graded_table(1))
