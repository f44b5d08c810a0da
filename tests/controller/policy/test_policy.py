"""A policy's choices: they equal SB3's, depend on the skip weight, and belong to one backbone."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from deepinsert.controller.learning.algorithms import ppo
from deepinsert.controller.learning.train_policy import train_policy
from deepinsert.controller.policy.layer_policy import LayerPolicy
from deepinsert.envs.rewards.table import RewardTable

WIDTH = 12
LAYERS = (0, 2, 5)


def test_probabilities_and_actions_are_those_of_sb3(random_table, tmp_path, monkeypatch):
    table, observations = random_table
    models = []
    monkeypatch.setattr(
        "deepinsert.controller.learning.algorithms.ppo", lambda *args: models.append(ppo(*args)) or models[-1]
    )
    train_policy(table, observations, steps=4096).save(tmp_path)
    loaded = LayerPolicy.load(tmp_path)
    many = np.random.default_rng(1).normal(3.0, 4.0, size=(500, WIDTH))
    normalised = loaded.normaliser(many)
    with torch.no_grad():
        expected = models[0].policy.get_distribution(torch.from_numpy(normalised)).distribution.probs.numpy()
    np.testing.assert_allclose(loaded.probabilities(many), expected, atol=1e-6, rtol=0)
    actions = models[0].predict(normalised, deterministic=True)[0]
    assert loaded.act(many).tolist() == np.array(LAYERS)[actions].tolist()
    assert len(set(actions)) > 1


def test_skip_weight_is_what_the_network_sees_beside_the_observation(ranged_policy, random_table):
    observations = random_table[1]
    weights = np.random.default_rng(3).uniform(0.1, 1.0, len(observations))
    inputs = np.concatenate(
        [ranged_policy.normaliser(observations), ranged_policy.skip_weights.features_of(weights)], axis=1
    )
    hidden = torch.from_numpy(inputs)
    for weight, bias in ranged_policy.network[:-1]:
        hidden = torch.relu(hidden @ weight.T + bias)
    weight, bias = ranged_policy.network[-1]
    expected = torch.softmax(hidden @ weight.T + bias, dim=1)
    np.testing.assert_allclose(
        ranged_policy.probabilities(observations, weights), expected, atol=1e-6, rtol=0
    )
    assert ranged_policy.columns(observations, weights).tolist() == expected.argmax(dim=1).tolist()
    layers = np.array(LAYERS)[ranged_policy.columns(observations, weights)]
    assert ranged_policy.act(observations, weights).tolist() == layers.tolist()
    one = ranged_policy.probabilities(observations, 0.3)
    assert (one == ranged_policy.probabilities(observations, np.full(len(observations), 0.3))).all()
    assert not np.allclose(one, ranged_policy.probabilities(observations, 0.9))
    default = ranged_policy.probabilities(observations)
    assert (default == ranged_policy.probabilities(observations, ranged_policy.skip_weight)).all()


@pytest.mark.parametrize("weight", [0.05, 1.1, float("nan"), [0.5, 2.0]])
def test_refuses_a_skip_weight_it_was_not_trained_for(ranged_policy, weight):
    with pytest.raises(ValueError, match=r"skip_weight.*0\.1 to 1"):
        ranged_policy.probabilities(np.zeros((2, WIDTH)), weight)


def test_one_skip_weight_is_all_that_a_policy_for_one_knows(random_policy):
    with pytest.raises(ValueError, match=r"skip_weight 0\.7.*0\.5"):
        random_policy.probabilities(np.zeros((2, WIDTH)), 0.7)
    with pytest.raises(ValueError, match="one for each prompt"):
        random_policy.probabilities(np.zeros((2, WIDTH)), [0.5, 0.5, 0.5])


def test_probabilities_do_not_depend_on_the_other_prompts(random_policy, random_table):
    observations = random_table[1]
    alone = np.concatenate([random_policy.probabilities(row[None]) for row in observations])
    np.testing.assert_allclose(alone, random_policy.probabilities(observations), atol=1e-6, rtol=0)
    np.testing.assert_allclose(alone.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("bonus", ["depth", "flops"])
def test_mean_rewards_are_those_of_the_training_table(random_table, bonus):
    table, observations = random_table
    policy = train_policy(table, observations, skip_weight=0.7, bonus=bonus, steps=1)
    np.testing.assert_allclose(policy.mean_rewards(), table.rewards(0.7, bonus).mean(axis=0))
    assert policy.training.best_fixed == LAYERS[policy.mean_rewards().argmax()]


@pytest.mark.parametrize(
    "observations",
    [np.zeros(WIDTH), np.zeros((2, WIDTH + 1)), np.full((1, WIDTH), np.nan), np.full((1, WIDTH), np.inf)],
)
def test_refuses_observations_it_was_not_made_for(random_policy, observations):
    with pytest.raises(ValueError, match="observations"):
        random_policy.probabilities(observations)


@pytest.fixture(scope="module")
def tiny_policy(tiny_backbone):
    rng = np.random.default_rng(2)
    width = tiny_backbone.model.get_input_embeddings().weight.shape[1]
    losses = rng.gamma(2.0, 0.4, size=(32, 3))
    table = RewardTable.from_losses(losses, (0, 1, 3), tiny_backbone.num_layers)
    return train_policy(
        table, rng.normal(size=(32, width)), steps=1, backbone=("tiny", tiny_backbone.fingerprint)
    )


def test_recommends_by_loading_its_own_backbone(tiny_policy, tiny_backbone, tmp_path):
    tiny_policy.save(tmp_path)
    picture = Image.new("RGB", (32, 32), "red")
    picture.save(tmp_path / "bus.png")
    loaded = LayerPolicy.load(tmp_path)
    advice = loaded.recommend("What colour is the bus?", image=picture)
    assert loaded.backbone is None
    assert loaded.checked_backbone() is loaded.checked_backbone()  # it is loaded once
    assert advice.insert_layer in (0, 1, 3)
    assert advice.probability == max(advice.probabilities.values())
    assert sum(advice.probabilities.values()) == pytest.approx(1, abs=1e-6)
    column = (0, 1, 3).index(advice.insert_layer)
    assert advice.expected.loss == loaded.training.loss[column]
    assert advice.expected.depth == advice.insert_layer / tiny_backbone.num_layers
    assert (advice.expected.flops_ratio < 1) == (advice.insert_layer > 0)
    prepared = LayerPolicy.load(tmp_path, backbone=tiny_backbone)
    assert prepared.recommend("What colour is the bus?", image=tmp_path / "bus.png") == advice
    assert prepared.recommend("What colour is the bus?").expected.flops_ratio == 1  # nothing to insert


def test_cannot_be_edited(random_policy):
    with pytest.raises(dataclasses.FrozenInstanceError):
        random_policy.table_digest = "0" * 16


def test_refuses_another_backbone(tiny_policy, tiny_backbone):
    other = dataclasses.replace(tiny_policy, backbone=tiny_backbone, backbone_fingerprint="feedfeedfeedfeed")
    with pytest.raises(ValueError, match="feedfeedfeedfeed.*" + tiny_backbone.fingerprint):
        other.recommend("What colour is the bus?")
