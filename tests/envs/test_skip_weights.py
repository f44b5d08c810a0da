"""The range of skip weights: what is in it, what is drawn from it, how it is shown."""

import numpy as np
import pytest

from deepinsert.envs.skip_weights import FEATURES, SkipWeights


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), (1, 0), (0, float("nan")), (0, 1, 2), ()])
def test_what_is_no_range_is_refused(value):
    with pytest.raises(ValueError, match="skip_weight"):
        SkipWeights.of(value)


def test_one_weight_is_a_range_without_features():
    weights = SkipWeights.of(0.5)
    assert weights.single and weights.features == 0 and weights == SkipWeights.of(weights)
    rng = np.random.default_rng(0)
    assert (weights.draw(rng, 4) == 0.5).all()
    assert rng.random() == np.random.default_rng(0).random()  # nothing was drawn
    assert weights.feature([0.5, 0.5]).shape == (2, 0)


def test_a_weight_outside_is_refused_by_the_name_of_the_range():
    weights = SkipWeights.of((0.1, 2))
    assert weights.check(0.1) == 0.1 and weights.check(2) == 2
    for outside in (0.0999, 2.001, float("nan")):
        with pytest.raises(ValueError, match=r"outside 0\.1 to 2"):
            weights.check(outside)
        with pytest.raises(ValueError, match=r"outside 0\.1 to 2"):
            weights.feature([1.0, outside])
    with pytest.raises(ValueError, match=r"outside 0\.5:"):
        SkipWeights.of(0.5).feature([0.6])


@pytest.mark.parametrize("ends", [(0, 1), (0.3, 1.7)])
def test_draws_fill_the_range_and_both_ends(ends):
    drawn = SkipWeights.of(ends).draw(np.random.default_rng(0), 12_000)
    assert drawn.min() == ends[0] and drawn.max() == ends[1]
    for end in ends:
        assert 800 < (drawn == end).sum() < 1200
    inside = drawn[(drawn > ends[0]) & (drawn < ends[1])]
    counts, _ = np.histogram(inside, bins=5, range=ends)
    assert (np.diff(counts) < 0).all() and counts[-1] > 1000


def test_features_tell_weights_apart_and_stay_within_one():
    weights = SkipWeights.of((0.2, 1.4))
    asked = np.linspace(0.2, 1.4, 50)
    features = weights.feature(asked)
    assert features.shape == (50, FEATURES) and features.dtype == np.float32
    assert (abs(features) <= 1).all()
    assert (features[0] == -1).all() and (features[-1] == 1).all()
    assert (np.diff(features.sum(axis=1)) > 0).all()
    np.testing.assert_array_equal(features[7:9], weights.feature(asked[7:9]))
