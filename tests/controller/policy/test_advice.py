"""The advice for a data set: its layer, its figures, and its sentences."""

import dataclasses

import numpy as np
import pytest

from deepinsert.controller.policy.advice import advise, nearest_candidate
from deepinsert.controller.policy.policy_pictures import plot_pareto
from deepinsert.controller.policy.sentences import policy_sentence
from deepinsert.controller.statistics import Interval
from deepinsert.envs.observations import prompt_embeddings
from deepinsert.envs.rewards.table import RewardTable

LAYERS = (0, 1, 2, 3, 5)


def of_losses(table, losses, flops=True):
    """A table of other losses about the same prompts."""
    return RewardTable.from_losses(
        losses,
        LAYERS,
        table.num_layers,
        flops=table.flops if flops else None,
        image_keys=table.image_keys,
        prompt_keys=table.prompt_keys,
    )


def with_training(policy, advantage, **training):
    """The policy with other training figures."""
    return dataclasses.replace(
        policy, training=dataclasses.replace(policy.training, advantage=advantage, **training)
    )


def test_without_a_table_the_layer_nearest_to_the_policys_mean_is_chosen(source_policy, rendered_prompts):
    result = advise(source_policy, rendered_prompts)
    layers = [row["insert_layer"] for row in result["per_prompt"]]
    sources = [prompt.source for prompt in rendered_prompts]
    assert [row["source"] for row in result["per_prompt"]] == sources
    assert [row["id"] for row in result["per_prompt"]] == [prompt.id for prompt in rendered_prompts]
    assert result["chosen_by"] == "mean of the policy's layers" and result["undecided"] is None
    assert result["mean_insert_layer"] == pytest.approx(np.mean(layers))
    assert result["insert_layer"] == min(LAYERS, key=lambda layer: abs(layer - np.mean(layers)))
    assert result["confidence_interval"] == result["mean_interval"]
    low, high = result["confidence_interval"]
    assert low <= result["mean_insert_layer"] <= high
    assert result["mean_depth"] == pytest.approx(np.mean(layers) / source_policy.num_layers)
    for source, counts in result["histogram"].items():
        chosen = [layer for layer, name in zip(layers, sources, strict=True) if name == source]
        assert counts == {str(layer): chosen.count(layer) for layer in LAYERS}


def test_policy_distinguishes_the_sources(source_policy, rendered_prompts, best_layer):
    rows = advise(source_policy, rendered_prompts)["per_prompt"]
    right = [
        row["insert_layer"] == best_layer(prompt) for row, prompt in zip(rows, rendered_prompts, strict=True)
    ]
    assert np.mean(right) > 0.85


def test_without_a_table_expectations_are_the_training_means(source_policy, rendered_prompts):
    result = advise(source_policy, rendered_prompts[:8], skip_weight=0.3)
    column = LAYERS.index(result["insert_layer"])
    assert result["skip_weight"] == 0.3
    assert result["expected"]["loss"] == source_policy.training.loss[column]
    assert result["expected"]["flops_ratio"] == source_policy.training.flops_ratio[column]
    assert result["expected"]["reward"] == pytest.approx(source_policy.mean_rewards(0.3)[column])
    assert result["best_fixed"]["insert_layer"] == LAYERS[source_policy.mean_rewards(0.3).argmax()]


@pytest.mark.parametrize("weight", [0.1, 0.6, 1.0])
def test_with_a_table_the_best_fixed_layer_is_chosen(source_policy, rendered_prompts, source_table, weight):
    result = advise(source_policy, rendered_prompts, skip_weight=weight, table=source_table)
    rewards = source_table.rewards(weight)
    best = rewards.mean(axis=0).argmax()
    assert result["chosen_by"] == "reward table" and result["insert_layer"] == LAYERS[best]
    assert LAYERS[best] in result["undecided"]
    assert result["confidence_interval"] == [result["undecided"][0], result["undecided"][-1]]
    assert sum(result["picked"].values()) == pytest.approx(1)
    for column, layer in enumerate(LAYERS):
        difference = result["difference"][layer]
        mean = (rewards[:, column] - rewards[:, best]).mean()
        assert difference["reward"] == pytest.approx(mean)
        low, high = difference["confidence_interval"]
        assert (layer in result["undecided"]) == (low <= 0 <= high)
    expected = result["expected"]
    assert expected["loss"] == pytest.approx(source_table.losses[:, best].mean())
    assert expected["flops_ratio"] == pytest.approx(source_table.flops_ratio[:, best].mean())
    assert expected["reward"] == pytest.approx(rewards[:, best].mean())
    assert expected["accuracy"] == pytest.approx(source_table.correct[:, best].mean())
    chosen = [LAYERS.index(row["insert_layer"]) for row in result["per_prompt"]]
    assert result["policy"]["reward"] == pytest.approx(rewards[np.arange(len(rewards)), chosen].mean())


def test_a_policy_that_wins_on_many_images_has_no_caveat(source_policy, rendered_prompts, source_table):
    result = advise(source_policy, rendered_prompts, table=source_table)
    assert result["images"] >= 20 and result["policy"]["minus_fixed"]["confidence_interval"][0] > 0
    assert result["caveat"] is None
    assert f"Insert layer {result['insert_layer']} earned the most" in result["verdict"]
    assert "choosing a layer for each prompt earned more" in result["verdict"]


def test_caveat_where_the_policy_does_not_beat_the_fixed_layer(source_policy, rendered_prompts, source_table):
    """Losses that punish every layer but 2, whatever the prompt."""
    losses = 0.5 + np.abs(np.array(LAYERS) - 2) + source_table.losses[:, :1]
    result = advise(source_policy, rendered_prompts, table=of_losses(source_table, losses))
    assert result["insert_layer"] == 2 and result["undecided"] == [2]
    assert result["caveat"] == (
        "Choosing a layer for each prompt did not beat insert layer 2 for all, so one fixed layer is as good."
    )
    assert "did not beat it (-" in result["verdict"]


def test_caveat_where_the_policy_always_chooses_the_fixed_layer(
    source_policy, rendered_prompts, source_table
):
    (weight, bias), *others = source_policy.network
    head, offset = others[-1]
    always = dataclasses.replace(
        source_policy,
        network=((weight, bias), (head, offset + 1000 * (np.array(LAYERS) == 1).astype(np.float32))),
    )
    losses = 0.5 + np.abs(np.array(LAYERS) - 1) + source_table.losses[:, :1]
    result = advise(always, rendered_prompts, table=of_losses(source_table, losses))
    assert "gives the same as insert layer 1 for all." in result["caveat"]
    assert result["mean_insert_layer"] == 1 and "chooses it for every prompt" in result["verdict"]


def test_caveat_where_images_are_few(source_policy, rendered_prompts, source_table):
    images = sorted(set(source_table.image_keys))[:6]
    rows = np.array([key in images for key in source_table.image_keys])
    some = [prompt for prompt, chosen in zip(rendered_prompts, rows, strict=True) if chosen]
    result = advise(source_policy, some, table=source_table.subset(rows))
    assert result["images"] == 6 and result["caveat"].startswith(
        ("With only 6 images", "6 images do not distinguish")
    )
    alone = advise(source_policy, some)
    assert alone["caveat"].startswith("With only 6 images the mean of the policy's layers says little")
    assert advise(source_policy, rendered_prompts)["caveat"] is None


def test_caveat_names_the_layers_that_are_not_distinguished(source_policy, rendered_prompts, source_table):
    losses = np.random.default_rng(1).gamma(2.0, 0.4, size=source_table.losses.shape)
    result = advise(source_policy, rendered_prompts, skip_weight=0.1, table=of_losses(source_table, losses))
    assert len(result["undecided"]) > 2
    assert "24 images do not distinguish insert layers" in result["caveat"]
    assert "prompts do not distinguish it from" in result["verdict"]


def test_without_a_table_the_caveat_is_about_the_training_comparison(source_policy, rendered_prompts):
    worse = with_training(source_policy, Interval(-0.01, -0.02, 0.0))
    assert "did not beat the best fixed layer" in advise(worse, rendered_prompts)["caveat"]
    better = with_training(source_policy, Interval(0.02, 0.01, 0.03))
    assert advise(better, rendered_prompts)["caveat"] is None


def test_the_policy_is_compared_on_held_out_prompts(source_policy, rendered_prompts, source_table):
    held_out = np.arange(len(source_table)) % 3 == 0
    result = advise(source_policy, rendered_prompts, table=source_table, held_out=held_out)
    rewards = source_table.rewards(1.0)
    chosen = np.array([LAYERS.index(row["insert_layer"]) for row in result["per_prompt"]])
    earned = rewards[np.arange(len(rewards)), chosen] - rewards[:, LAYERS.index(result["insert_layer"])]
    assert result["policy"]["minus_fixed"]["reward"] == pytest.approx(earned[held_out].mean())
    assert result["policy"]["judged_on"]["prompts"] == held_out.sum() == result["pareto"]["prompts"]
    assert (
        f"On the {held_out.sum()} held-out ones of these prompts" in result["verdict"]
        and result["caveat"] is None
    )
    few = sorted(set(source_table.image_keys))[:5]
    few_held_out = advise(
        source_policy,
        rendered_prompts,
        table=source_table,
        held_out=np.array([key in few for key in source_table.image_keys]),
    )
    assert few_held_out["caveat"] == (
        "Only 5 images show that choosing a layer for each prompt earns more, which says little."
    )


def test_a_table_without_flops_gives_no_pareto_curves(source_policy, rendered_prompts, source_table):
    result = advise(
        source_policy, rendered_prompts, table=of_losses(source_table, source_table.losses, flops=False)
    )
    assert result["pareto"] is None and result["expected"]["flops_ratio"] is None


def test_without_a_table_the_pareto_curves_are_those_of_training(
    source_policy, rendered_prompts, source_table, tmp_path
):
    assert advise(source_policy, rendered_prompts)["pareto"] is None  # never measured over its skip weights
    points = source_policy.measure_frontier(
        source_table, prompt_embeddings(source_policy.backbone, rendered_prompts)
    )
    measured = with_training(source_policy, None, frontier=points)
    result = advise(measured, rendered_prompts)
    curves = result["pareto"]
    assert [point["flops_ratio"] for point in curves["policy"]] == [point.flops_ratio for point in points]
    assert [point["loss_increase"] for point in curves["fixed"]] == pytest.approx(
        np.array(source_policy.training.loss) - source_policy.training.loss[0]
    )
    assert curves["oracle"] is None and plot_pareto(result, tmp_path / "pareto.png").is_file()
    deeper = [dataclasses.replace(point, loss_increase=None) for point in points]
    without_layer_0 = with_training(source_policy, None, frontier=tuple(deeper))
    assert advise(without_layer_0, rendered_prompts)["pareto"] is None


@pytest.mark.parametrize(
    ("mean", "layer"), [(0.0, 0), (0.5, 0), (0.6, 1), (3.9, 3), (4.0, 3), (4.1, 5), (9, 5)]
)
def test_nearest_candidate(mean, layer):
    assert nearest_candidate(LAYERS, mean) == layer


def test_policy_sentence_names_the_comparison(source_policy):
    assert "was not compared" in policy_sentence(source_policy, 1.0)
    better = with_training(source_policy, Interval(0.02, 0.01, 0.03))
    assert "On held-out prompts, choosing a layer for each prompt earned more" in policy_sentence(better, 1.0)
    assert "On held-out prompts at skip weight 1, choosing" in policy_sentence(better, 0.5)
    for interval in (Interval(0.02, -0.01, 0.05), Interval(-0.02, -0.03, -0.01), Interval(0.0, 0.0, 0.0)):
        assert "did not beat the best fixed layer" in policy_sentence(
            with_training(source_policy, interval), 1.0
        )


def test_verdict_names_a_better_layer_than_the_mean(source_policy, rendered_prompts):
    misled = with_training(
        source_policy, Interval(0.02, 0.01, 0.03), loss=(0.1, 9.0, 9.0, 9.0, 0.1), best_fixed=5
    )
    result = advise(misled, rendered_prompts)
    assert result["insert_layer"] in (1, 2, 3)
    assert f"insert layer 5 earned {8.9 + (5 - result['insert_layer']) / 8:.4f} more" in result["verdict"]
