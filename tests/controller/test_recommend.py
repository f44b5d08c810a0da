"""Advice for a prompt and for a data set, and what it says about itself."""

import dataclasses
import json

import numpy as np
import pytest

from controller.data import image_prompts
from controller.options import RecommendOptions
from controller.policy import LayerPolicy, Training
from controller.recommend import for_prompts, nearest_candidate, run, verdict
from controller.statistics import Interval
from controller.training import train_policy
from envs.observations import prompt_embeddings
from envs.rewards import RewardTable

LAYERS = (0, 1, 2, 3, 5)


@pytest.fixture(scope="module")
def prompts(rendered_data):
    return image_prompts(RecommendOptions(out=rendered_data.parent, policy=rendered_data, data=rendered_data))


@pytest.fixture(scope="module")
def policy(tiny_backbone, prompts):
    """Trained on losses under which prompts of source "gqa" bear layer 1, others layer 3."""
    bears = np.array([[1 if prompt.source == "gqa" else 3] for prompt in prompts[0]])
    losses = 0.5 + np.maximum(0, np.array(LAYERS) - bears)
    flops = 100.0 - 10.0 * np.array(LAYERS) + np.zeros((len(losses), 1))
    table = RewardTable.from_losses(losses, LAYERS, tiny_backbone.num_layers, flops=flops)
    observations = prompt_embeddings(tiny_backbone, prompts[0])
    return train_policy(table, observations, backbone=(tiny_backbone.name, tiny_backbone.fingerprint))


@pytest.fixture(scope="module")
def policy_folder(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    policy.save(folder)
    return folder


def test_data_set_gets_the_layer_nearest_to_the_policys_mean(policy, tiny_backbone, prompts):
    result = for_prompts(policy, tiny_backbone, prompts[0])
    layers = [row["insert_layer"] for row in result["per_prompt"]]
    sources = [prompt.source for prompt in prompts[0]]
    assert [row["source"] for row in result["per_prompt"]] == sources
    assert [row["id"] for row in result["per_prompt"]] == [prompt.id for prompt in prompts[0]]
    assert result["mean_insert_layer"] == pytest.approx(np.mean(layers))
    assert result["insert_layer"] == min(LAYERS, key=lambda layer: abs(layer - np.mean(layers)))
    low, high = result["confidence_interval"]
    assert low <= result["mean_insert_layer"] <= high
    assert result["mean_depth"] == pytest.approx(np.mean(layers) / tiny_backbone.num_layers)
    for source, counts in result["histogram"].items():
        chosen = [layer for layer, name in zip(layers, sources, strict=True) if name == source]
        assert counts == {str(layer): chosen.count(layer) for layer in LAYERS}


def test_policy_told_the_sources_apart(policy, tiny_backbone, prompts):
    rows = for_prompts(policy, tiny_backbone, prompts[0])["per_prompt"]
    right = [row["insert_layer"] == (1 if row["source"] == "gqa" else 3) for row in rows]
    # A fixed layer would be right for two thirds of them.
    assert np.mean(right) > 0.85


def test_expectations_are_the_training_tables(policy, tiny_backbone, prompts):
    result = for_prompts(policy, tiny_backbone, prompts[0][:8])
    column = LAYERS.index(result["insert_layer"])
    assert result["expected"]["loss"] == policy.training.loss[column]
    assert result["expected"]["flops_ratio"] == pytest.approx(1 - 0.1 * result["insert_layer"])
    assert result["expected"]["reward"] == pytest.approx(policy.mean_rewards()[column])
    assert result["best_fixed"]["insert_layer"] == LAYERS[policy.mean_rewards().argmax()]


@pytest.mark.parametrize(
    ("mean", "layer"), [(0.0, 0), (0.5, 0), (0.6, 1), (3.9, 3), (4.0, 3), (4.1, 5), (9, 5)]
)
def test_nearest_candidate(mean, layer):
    assert nearest_candidate(LAYERS, mean) == layer


def judged(policy, advantage, **training):
    return dataclasses.replace(
        policy, training=dataclasses.replace(policy.training, advantage=advantage, **training)
    )


def test_verdict_says_whether_the_policy_was_worth_it(policy):
    assert "was not judged" in verdict(policy)
    assert "earned more than" in verdict(judged(policy, Interval(0.02, 0.01, 0.03)))
    for interval in (Interval(0.02, -0.01, 0.05), Interval(-0.02, -0.03, -0.01), Interval(0.0, 0.0, 0.0)):
        assert "did not beat the best fixed layer" in verdict(judged(policy, interval))


def test_verdict_says_where_the_mean_layer_earned_less(policy):
    training = Training(10, (0.1, 0.1, 2.0, 0.1, 0.1), None, 5, Interval(0.02, 0.01, 0.03))
    torn = dataclasses.replace(policy, training=training, num_layers=10, skip_weight=0.5)
    assert "insert layer 5 earned 2.0500 more on average than 2" in verdict(torn, 2)
    assert "earned 2" not in verdict(torn, 5)


def test_command_for_a_data_set(policy_folder, rendered_data, prompts, tmp_path, capsys):
    options = RecommendOptions(out=tmp_path, policy=policy_folder, data=rendered_data, device="cpu")
    result = run(options)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result["prompts"] == {"used": len(prompts[0]), "text_only_left_out": prompts[1]}
    assert prompts[1] > 0
    assert (tmp_path / "recommend.png").read_bytes()[:4] == b"\x89PNG"
    assert f"insert layer {result['insert_layer']}" in capsys.readouterr().out
    assert run(options) == result  # a finished run is read, not repeated


def test_command_for_a_prompt(policy_folder, rendered_data, prompts, tmp_path):
    asked = next(prompt for prompt in prompts[0] if len(prompt.messages) == 2)
    image = rendered_data.parent / asked.images[0].path
    options = RecommendOptions(
        out=tmp_path, policy=policy_folder, prompt=asked.question, image=image, device="cpu"
    )
    result = run(options)
    assert (
        result["insert_layer"] in LAYERS and result["per_prompt"][0]["insert_layer"] == result["insert_layer"]
    )
    assert result["probability"] == result["probabilities"][str(result["insert_layer"])]
    expected = LayerPolicy.load(policy_folder).recommend(asked.question, image)
    assert result["expected"] == dataclasses.asdict(expected.expected)
    assert "training prompts" in result["note"]
    blind = run(dataclasses.replace(options, image=None, out=tmp_path / "blind"))
    assert "changes nothing" in blind["note"] and blind["expected"]["flops_ratio"] == 1


def test_command_refuses(policy_folder, rendered_data, tmp_path):
    with pytest.raises(ValueError, match="--prompt"):
        run(RecommendOptions(out=tmp_path, policy=policy_folder))
    with pytest.raises(ValueError, match="--prompt"):
        run(RecommendOptions(out=tmp_path, policy=policy_folder, prompt="What?", data=rendered_data))
    with pytest.raises(ValueError, match="has an image"):
        run(RecommendOptions(out=tmp_path, policy=policy_folder, data=rendered_data, sources="text"))
    with pytest.raises(ValueError, match=r"policy\.json"):
        run(RecommendOptions(out=tmp_path, policy=tmp_path / "nowhere", prompt="What?"))
