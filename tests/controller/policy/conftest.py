"""Small policies and reward tables that several test modules share."""

import dataclasses

import numpy as np
import pytest
import torch

from deepinsert.controller.learning.train_policy import train_policy
from deepinsert.controller.options import RecommendOptions
from deepinsert.controller.policy.outcomes import FrontierPoint
from deepinsert.controller.prompt_selection import image_prompts
from deepinsert.controller.statistics import Interval
from deepinsert.envs.observations import Observation, prompt_embeddings
from deepinsert.envs.rewards.table import RewardTable
from deepinsert.envs.skip_weights import SkipWeights

RANDOM_LAYERS = (0, 2, 5)
WIDTH = 12
SOURCE_LAYERS = (0, 1, 2, 3, 5)


@pytest.fixture(scope="session")
def random_table():
    """A table of random losses at layers 0, 2 and 5 of 6, and observations of 12 numbers."""
    rng = np.random.default_rng(0)
    losses = rng.gamma(2.0, 0.4, size=(64, len(RANDOM_LAYERS)))
    flops = 100.0 - 10.0 * np.array(RANDOM_LAYERS) + np.zeros((64, 1))
    table = RewardTable.from_losses(losses, RANDOM_LAYERS, 6, flops=flops)
    return table, rng.normal(3.0, 2.0, size=(64, WIDTH))


@pytest.fixture(scope="session")
def random_policy(random_table):
    """A policy for one skip weight on the random table."""
    return train_policy(*random_table, steps=2048, seed=1, backbone=("tiny", "0123456789abcdef"))


@pytest.fixture(scope="session")
def ranged_policy(random_policy):
    """The random policy with an input for λ and every optional field set."""
    (weight, bias), *others = random_policy.network
    skip_weights = SkipWeights(0.1, 1.0)
    generator = torch.Generator().manual_seed(0)
    extra = torch.randn(len(bias), skip_weights.num_features, generator=generator)
    return dataclasses.replace(
        random_policy,
        skip_weights=skip_weights,
        bonus="time",
        algorithm="full-info",
        observation=Observation(3, True),
        network=((torch.cat([weight, extra], dim=1), bias), *others),
        table_digest="00112233aabbccdd",
        activation="relu",
        training=dataclasses.replace(
            random_policy.training,
            advantage=Interval(0.1, 0.0, 0.2),
            times=(1.0, 0.9, 0.7),
            frontier=(
                FrontierPoint(0.1, 0.3, 0.01, 0.9, -0.2),
                FrontierPoint(1.0, 0.4, None, None, 0.1),
            ),
        ),
    )


@pytest.fixture(scope="session")
def rendered_prompts(rendered_data):
    """The prompts with images of `rendered_data`."""
    options = RecommendOptions(out=rendered_data.parent, policy=rendered_data, data=rendered_data)
    return list(image_prompts(options)[0])


@pytest.fixture(scope="session")
def best_layer():
    """Return a function that gives a prompt's best layer: 1 for prompts of source "gqa", otherwise 3."""
    return lambda prompt: 1 if prompt.source == "gqa" else 3


@pytest.fixture(scope="session")
def source_table(tiny_backbone, rendered_prompts, best_layer):
    """A table with the real FLOPs of the rendered prompts; losses rise by 1 nat per layer beyond the best."""
    real = RewardTable(tiny_backbone, rendered_prompts, SOURCE_LAYERS)
    limits = np.array([[best_layer(prompt)] for prompt in rendered_prompts])
    noise = [int(key, 16) / 16**16 / 50 for key in real.prompt_keys]  # equal for equal prompts
    losses = 0.5 + np.array(noise)[:, None] + np.maximum(0, np.array(SOURCE_LAYERS) - limits)
    return RewardTable.from_losses(
        losses,
        SOURCE_LAYERS,
        real.num_layers,
        correct=losses < 1,
        flops=real.flops,
        full_flops=real.stock_flops,
        sources=real.sources,
        image_keys=real.image_keys,
        prompt_ids=real.prompt_ids,
        prompt_keys=real.prompt_keys,
        origin=real.origin,
    )


@pytest.fixture(scope="session")
def source_policy(tiny_backbone, rendered_prompts, source_table, fit):
    """A policy for skip weights 0.1 to 1 that distinguishes the sources."""
    observations = prompt_embeddings(tiny_backbone, rendered_prompts)
    identity = (tiny_backbone.name, tiny_backbone.fingerprint)
    policy = fit(source_table, observations, SkipWeights(0.1, 1.0), identity)
    return dataclasses.replace(policy, backbone=tiny_backbone)
