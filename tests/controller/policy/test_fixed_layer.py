"""The one layer to finetune at: how often the true layer is among the undecided, and doubts about it."""

import numpy as np
import pytest

from deepinsert.controller.policy.fixed_layer import choose_fixed_layer
from deepinsert.controller.policy.sentences import WIDE, fixed_layer_doubt, name_layers
from deepinsert.controller.statistics import paired_interval

LAYERS = 8
TRUE = 3
SEEDS = 60


def rewards_of(seed, images, questions=2, step=0.004, noise=0.05):
    """Return rewards (P, K) with the highest mean at `TRUE`, which falls by `step` per layer on both sides.

    Questions about one image share most of their noise.
    """
    rng = np.random.default_rng(seed)
    mean = -step * np.abs(np.arange(LAYERS) - TRUE)
    shared = rng.normal(0, noise, size=(images, 1, LAYERS)) + rng.normal(0, 0.5, size=(images, 1, 1))
    values = mean + shared + rng.normal(0, noise, size=(images, questions, LAYERS))
    keys = [f"{image}.png" for image in range(images) for _ in range(questions)]
    return values.reshape(-1, LAYERS), keys


@pytest.mark.parametrize("images", [32, 128, 512, 2048])
def test_the_true_layer_is_among_the_undecided(images):
    chosen = [choose_fixed_layer(*rewards_of(seed, images), samples=400) for seed in range(SEEDS)]
    assert np.mean([TRUE in fixed.undecided for fixed in chosen]) >= 0.9
    assert all(fixed.column in fixed.undecided for fixed in chosen)


def test_more_images_leave_fewer_layers():
    sizes, right = [], []
    for images in (32, 512, 8192):
        chosen = [choose_fixed_layer(*rewards_of(seed, images), samples=200) for seed in range(12)]
        sizes.append(np.mean([len(fixed.undecided) for fixed in chosen]))
        right.append(np.mean([fixed.column == TRUE for fixed in chosen]))
    assert sizes[0] > sizes[1] > sizes[2] and sizes[0] > 4 and sizes[2] < 2.5
    assert right[0] < right[2] == 1


def test_intervals_are_those_of_a_paired_bootstrap_over_images():
    rewards, keys = rewards_of(0, 200)
    fixed = choose_fixed_layer(rewards, keys, samples=4000)
    assert fixed.column == rewards.mean(axis=0).argmax() and fixed.images == 200
    for column, interval in enumerate(fixed.difference):
        expected = paired_interval(rewards[:, column], rewards[:, fixed.column], keys, samples=4000, seed=1)
        assert interval == pytest.approx(expected, abs=0.0015)
        assert (column in fixed.undecided) == (interval.low <= 0 <= interval.high)
    assert sum(fixed.best_shares) == pytest.approx(1)
    assert fixed.best_shares[fixed.column] == max(fixed.best_shares)


def test_best_shares_count_bootstrap_samples():
    rng = np.random.default_rng(0)
    first = rng.normal(0, 1, size=100)
    rewards = np.column_stack([first, first[::-1], np.full(100, -9.0)])
    shares = choose_fixed_layer(rewards, range(100)).best_shares
    assert shares[0] == pytest.approx(0.5, abs=0.05) and shares[2] == 0


def test_layers_with_equal_rewards_stay_undecided():
    rewards, keys = rewards_of(0, 100)
    rewards[:, 4] = rewards[:, 3]
    fixed = choose_fixed_layer(rewards - np.array([9, 9, 9, 0, 0, 9, 9, 9]), keys)
    assert fixed.undecided == (3, 4) and fixed.column == 3 and fixed.images_needed is None


def test_one_image_decides_nothing():
    rewards, _ = rewards_of(0, 1, questions=40)
    fixed = choose_fixed_layer(rewards, ["one.png"] * 40)
    assert fixed.undecided == tuple(range(LAYERS)) and fixed.best_shares == ()
    assert (
        fixed_layer_doubt(fixed, range(LAYERS), LAYERS) == "1 image does not distinguish insert layers 0 to 7"
    )


def test_the_reported_number_of_images_decides():
    decided = []
    for seed in range(20):
        fixed = choose_fixed_layer(*rewards_of(seed, 256, step=0.02), samples=400)
        if fixed.images_needed is not None:
            assert fixed.images_needed > 256
            more = choose_fixed_layer(
                *rewards_of(seed + 100, min(4 * fixed.images_needed, 20_000), step=0.02), samples=400
            )
            decided.append(len(more.undecided) == 1)
    assert len(decided) >= 3 and np.mean(decided) >= 0.7


@pytest.mark.parametrize(
    ("images", "step", "start"),
    [
        (400, 0.1, None),
        (19, 0.5, "with only 19 images this says little about others"),
        (20, 0.5, None),
        (400, 0.0005, "400 images do not distinguish insert layers"),
        (8, 0.001, "8 images do not distinguish insert layers"),
    ],
)
def test_doubt_where_images_are_few_or_undecided_layers_many(images, step, start):
    fixed = choose_fixed_layer(*rewards_of(1, images, step=step))
    text = fixed_layer_doubt(fixed, range(LAYERS), LAYERS)
    wide = fixed.undecided[-1] - fixed.undecided[0] > WIDE * LAYERS
    assert (text is not None) == (images < 20 or wide)
    assert text is None if start is None else text.startswith(start)


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ([3], "3"),
        ([3, 4], "3 and 4"),
        ([3, 4, 5], "3 to 5"),
        ([0, 2, 3, 4, 7], "0, 2 to 4 and 7"),
        ([0, 1, 5, 6, 7], "0, 1 and 5 to 7"),
    ],
)
def test_layers_are_named_shortly(layers, text):
    assert name_layers(layers) == text
