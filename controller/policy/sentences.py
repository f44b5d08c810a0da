"""The sentences of an advice: its verdict, and its caveat, which lists doubts about the advice."""

from __future__ import annotations

from collections.abc import Sequence

from deepinsert.controller.statistics import Interval

from .baselines import FEW_IMAGES
from .fixed_layer import FixedLayer
from .layer_policy import LayerPolicy
from .outcomes import FixedLayerComparison

WIDE = 0.25
"""An interval or set of layers that spans more than this share of the depth leaves the choice open."""


def policy_sentence(policy: LayerPolicy, skip_weight: float) -> str:
    """Say whether a layer per prompt beat the best fixed layer on the policy's held-out prompts.

    The sentence names the policy's own skip weight, at which that was measured, unless it is `skip_weight`.
    """
    best, advantage = policy.training.best_fixed, policy.training.advantage
    if advantage is None:
        return "This policy was not compared with fixed layers on held-out prompts."
    at = "" if skip_weight == policy.skip_weight else f" at skip weight {policy.skip_weight:g}"
    if advantage.low > 0:
        return (
            f"On held-out prompts{at}, choosing a layer for each prompt earned more than the best fixed "
            f"layer, {best} ({format_advantage(advantage)})."
        )
    return (
        f"On held-out prompts{at}, choosing a layer for each prompt did not beat the best fixed layer, "
        f"{best} ({format_advantage(advantage)}): one fixed layer is as good."
    )


def mean_sentence(policy: LayerPolicy, insert_layer: int, skip_weight: float) -> str:
    """Say whether another fixed layer had a higher mean reward on the training prompts; empty if not."""
    rewards = policy.mean_rewards(skip_weight)
    if rewards is None:
        return ""
    column = int(rewards.argmax())
    if policy.insert_layers[column] == insert_layer:
        return ""
    loss = rewards[column] - rewards[policy.insert_layers.index(insert_layer)]
    return (
        f" On the training prompts insert layer {policy.insert_layers[column]} earned {loss:.4f} more on "
        f"average than {insert_layer}, the layer nearest to the policy's mean."
    )


def mean_caveat(policy: LayerPolicy, mean: Interval, images: int) -> str | None:
    """Return the caveat of a layer that was chosen by the mean of the policy's layers on `images` images."""
    doubts = []
    if images < FEW_IMAGES:
        doubts.append(f"with only {images} images the mean of the policy's layers says little")
    elif mean.high - mean.low > WIDE * policy.num_layers:
        doubts.append(f"{images} images leave the mean between layers {mean.low:.1f} and {mean.high:.1f}")
    advantage = policy.training.advantage
    if advantage is not None and advantage.low <= 0:
        doubts.append("on held-out prompts, choosing a layer for each did not beat the best fixed layer")
    return join_doubts(doubts)


def table_verdict(
    insert_layer: int, undecided: Sequence[int], prompts: int, comparison: FixedLayerComparison
) -> str:
    """Return the verdict on a layer that was chosen by rewards.

    Args:
        insert_layer: the chosen layer.
        undecided: the layers that are not significantly different from it, and itself.
        prompts: the number of prompts.
        comparison: the policy against that layer.
    """
    rivals = [layer for layer in undecided if layer != insert_layer]
    certainty = "every other one earned less"
    if rivals:
        certainty = f"the {prompts} prompts do not distinguish it from {name_layers(rivals)}"
    figures = format_advantage(comparison.advantage)
    if comparison.always:
        policy = f"On {comparison.prompt_set} the policy chooses it for every prompt."
    elif comparison.wins:
        policy = f"On {comparison.prompt_set}, choosing a layer for each prompt earned more ({figures})."
    else:
        policy = f"On {comparison.prompt_set}, choosing a layer for each prompt did not beat it ({figures})."
    return f"Insert layer {insert_layer} earned the most on average, and {certainty}. {policy}"


def table_caveat(
    fixed: FixedLayer, insert_layers: Sequence[int], num_layers: int, comparison: FixedLayerComparison
) -> str | None:
    """Return the caveat of a layer that was chosen by rewards.

    Args:
        fixed: the chosen layer.
        insert_layers: the candidates.
        num_layers: N, the backbone's decoder layers.
        comparison: the policy against that layer.
    """
    layer, images = insert_layers[fixed.column], comparison.images
    doubt = fixed_layer_doubt(fixed, insert_layers, num_layers)
    doubts = [] if doubt is None else [doubt]
    if comparison.always:
        doubts.append(f"choosing a layer for each prompt gives the same as insert layer {layer} for all")
    elif not comparison.wins:
        doubts.append(
            f"choosing a layer for each prompt did not beat insert layer {layer} for all, so one fixed layer "
            "is as good"
        )
    elif images < FEW_IMAGES <= fixed.images:
        doubts.append(
            f"only {images} images show that choosing a layer for each prompt earns more, which says little"
        )
    return join_doubts(doubts)


def fixed_layer_doubt(fixed: FixedLayer, insert_layers: Sequence[int], num_layers: int) -> str | None:
    """Return why the choice of a fixed layer is uncertain, without a full stop; None if it is certain."""
    layers = [insert_layers[column] for column in fixed.undecided]
    few = fixed.images < FEW_IMAGES
    if not few and layers[-1] - layers[0] <= WIDE * num_layers:
        return None
    if len(layers) == 1:
        return f"with only {fixed.images} images this says little about others"
    needed = "" if fixed.images_needed is None else f"; about {fixed.images_needed:,} images would"
    count = "1 image does" if fixed.images == 1 else f"{fixed.images} images do"
    return f"{count} not distinguish insert layers {name_layers(layers)}{needed}"


def join_doubts(doubts: Sequence[str]) -> str | None:
    """Return one sentence of all doubts about the advice; None if there is none."""
    if not doubts:
        return None
    text = "; ".join(doubts)
    return f"{text[0].upper()}{text[1:]}."


def name_layers(layers: Sequence[int]) -> str:
    """Format ascending layers: `[1, 2, 3, 7]` is "1 to 3 and 7"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts: list[str] = []
    for run in runs:
        parts += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(layer) for layer in run]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def format_advantage(advantage: Interval) -> str:
    """Format the difference of two mean rewards with its interval."""
    return f"{advantage.mean:+.4f}, 95 % interval {advantage.low:+.4f} to {advantage.high:+.4f}"
