"""The range of skip weights: its bounds, the draws from it, and its features."""

import numpy as np
import pytest

from deepinsert.envs.skip_weights import NUM_FEATURES, SkipWeights


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), (1, 0), (0, float("nan")), (0, 1, 2), ()])
def test_bad_ranges_are_refused(value):
    with pytest.raises(ValueError, match="skip_weight"):
        SkipWeights.of(value)


def test_one_weight_is_a_range_without_features():
    weights = SkipWeights.of(0.5)
    assert weights.single and weights.num_features == 0 and weights == SkipWeights.of(weights)
    rng = np.random.default_rng(0)
    assert (weights.draw(rng, 4) == 0.5).all()
    assert rng.random() == np.random.default_rng(0).random()  # nothing was drawn
    assert weights.features_of([0.5, 0.5]).shape == (2, 0)


def test_an_error_about_a_weight_outside_names_the_range():
    weights = SkipWeights.of((0.1, 2))
    assert weights.check(0.1) == 0.1 and weights.check(2) == 2
    for outside in (0.0999, 2.001, float("nan")):
        with pytest.raises(ValueError, match=r"outside 0\.1 to 2"):
            weights.check(outside)
        with pytest.raises(ValueError, match=r"outside 0\.1 to 2"):
            weights.features_of([1.0, outside])
    with pytest.raises(ValueError, match=r"outside 0\.5:"):
        SkipWeights.of(0.5).features_of([0.6])


@pytest.mark.parametrize("ends", [(0, 1), (0.3, 1.7)])
def test_draws_cover_the_range_and_both_ends(ends):
    draws = SkipWeights.of(ends).draw(np.random.default_rng(0), 12_000)
    assert draws.min() == ends[0] and draws.max() == ends[1]
    for end in ends:
        assert 800 < (draws == end).sum() < 1200
    inside = draws[(draws > ends[0]) & (draws < ends[1])]
    counts, _ = np.histogram(inside, bins=5, range=ends)
    assert (np.diff(counts) < 0).all() and counts[-1] > 1000


def test_features_distinguish_weights_and_stay_within_one():
    weights = SkipWeights.of((0.2, 1.4))
    values = np.linspace(0.2, 1.4, 50)
    features = weights.features_of(values)
    assert features.shape == (50, NUM_FEATURES) and features.dtype == np.float32
    assert (abs(features) <= 1).all()
    assert (features[0] == -1).all() and (features[-1] == 1).all()
    assert (np.diff(features.sum(axis=1)) > 0).all()
    np.testing.assert_array_equal(features[7:9], weights.features_of(values[7:9]))
