"""`recommend`: what a trained policy advises, for one prompt or for a data set to finetune on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backbones import Backbone, load_backbone
from envs.observations import prompt_embeddings
from envs.prompts import Prompt

from .baselines import PAPER_MEAN_DEPTH
from .data import image_prompts
from .options import RecommendOptions, check
from .plots import plot_recommendation
from .policy import LayerPolicy
from .runs import read_result, start_run, write_result
from .statistics import mean_interval


def run(options: RecommendOptions) -> dict[str, Any]:
    """Ask the policy in `options.policy` and write `result.json`, for a data set `recommend.png` too.

    A finished run is not repeated. Raises `ValueError` unless exactly one of a prompt and a data set is
    given, for a backbone that the policy was not trained on, and for data without a prompt that has an image.
    """
    check(options)
    out = start_run(options)
    if (out / "result.json").is_file():
        result = read_result(out)
        print(summary(result))
        return result
    policy = LayerPolicy.load(options.policy)
    policy.backbone = load_backbone(options.backbone, device=options.device, dtype=options.dtype)
    backbone = policy.checked_backbone()
    if options.prompt is not None:
        result = for_prompt(policy, Prompt.from_question(options.prompt, options.image))
    else:
        prompts, text_only = image_prompts(options)
        result = for_prompts(policy, backbone, prompts, options.batch_size, options.seed)
        result["prompts"]["text_only_left_out"] = text_only
        plot_recommendation(result, out / "recommend.png")
    write_result(out, result)
    print(summary(result))
    return read_result(out)


def summary(result: dict[str, Any]) -> str:
    """The advice in two or three lines."""
    what = result["expected"]
    ratio = "unknown" if what["flops_ratio"] is None else f"{what['flops_ratio']:.3f}"
    figures = f"expected loss {what['loss']:.4f} nats, prefill FLOPs ratio {ratio}"
    if result["confidence_interval"] is None:
        layer = f"insert layer {result['insert_layer']} (probability {result['probability']:.2f})"
        return f"{layer}, {figures}\n{result['note']}"
    low, high = result["confidence_interval"]
    mean = f"mean of {len(result['per_prompt'])} prompts {result['mean_insert_layer']:.2f}"
    return (
        f"insert layer {result['insert_layer']} ({mean}, 95 % interval {low:.2f} to {high:.2f}), {figures}\n"
        f"{result['verdict']}"
    )


def for_prompt(policy: LayerPolicy, prompt: Prompt) -> dict[str, Any]:
    """The layer for one prompt, its probability, and what to expect there: the training prompts' mean loss,
    this prompt's FLOPs ratio, and the depth."""
    advice = policy.recommend_prompts([prompt])[0]
    note = "The expected loss is the mean of the policy's training prompts at this layer."
    if not prompt.images:
        note += " Without an image nothing enters at the insert layer: the choice changes nothing."
    return {
        "question": prompt.question,
        "skip_weight": policy.skip_weight,
        "insert_layer": advice.insert_layer,
        "confidence_interval": None,
        "probability": advice.probability,
        "probabilities": advice.probabilities,
        "expected": asdict(advice.expected),
        "per_prompt": [per_prompt(prompt, advice.insert_layer, advice.probability)],
        "note": note,
        "verdict": verdict(policy),
    }


def for_prompts(
    policy: LayerPolicy, backbone: Backbone, prompts: Sequence[Prompt], batch_size: int = 32, seed: int = 0
) -> dict[str, Any]:
    """The one layer to finetune at for these prompts, and the layer of each prompt.

    The policy chooses per prompt, a finetuned variant has one layer. As in the paper (Appendix D: mean depth
    0.14, so 4.5 of 32 layers, and variants at 4), it is the candidate nearest to the mean of the per-prompt
    layers, the shallower of two: a mean moves little when few prompts change their mind, its interval says
    how little, and it needs no answers, so it can be taken on data that the policy has never seen. Where the
    policy is torn between far layers the mean may suit neither; the best fixed layer of the training prompts
    therefore stands beside it, and `verdict` says when that one earned more.

    `confidence_interval` is the 95 % interval of the mean layer, by bootstrap over images.
    """
    probabilities = policy.probabilities(prompt_embeddings(backbone, prompts, batch_size))
    columns = probabilities.argmax(axis=1)
    layers = np.array(policy.insert_layers)[columns]
    mean = mean_interval(layers, [prompt.image_key for prompt in prompts], seed=seed)
    chosen = nearest_candidate(policy.insert_layers, mean.mean)
    depth = np.array(mean) / policy.num_layers
    return {
        "skip_weight": policy.skip_weight,
        "insert_layer": chosen,
        "confidence_interval": [mean.low, mean.high],
        "mean_insert_layer": mean.mean,
        "mean_depth": depth[0],
        "mean_depth_interval": depth[1:],
        "paper_mean_depth": PAPER_MEAN_DEPTH,
        "insert_layers": policy.insert_layers,
        "num_layers": policy.num_layers,
        "expected": expected(policy, chosen),
        "best_fixed": {
            "insert_layer": policy.training.best_fixed,
            **expected(policy, policy.training.best_fixed),
        },
        "prompts": {"used": len(prompts)},
        "histogram": histogram([prompt.source for prompt in prompts], layers, policy.insert_layers),
        "per_prompt": [
            per_prompt(prompt, int(layer), float(row[column]))
            for prompt, layer, row, column in zip(prompts, layers, probabilities, columns, strict=True)
        ],
        "verdict": verdict(policy, chosen),
    }


def nearest_candidate(insert_layers: Sequence[int], mean: float) -> int:
    """The candidate nearest to `mean`; the shallower of two equally near."""
    return min(insert_layers, key=lambda layer: (abs(layer - mean), layer))


def expected(policy: LayerPolicy, insert_layer: int) -> dict[str, float | None]:
    """Means over the policy's training prompts at one layer: loss in nats, FLOPs ratio, reward; and depth."""
    column = policy.insert_layers.index(insert_layer)
    ratios, rewards = policy.training.flops_ratio, policy.mean_rewards()
    return {
        "loss": policy.training.loss[column],
        "flops_ratio": None if ratios is None else ratios[column],
        "depth": insert_layer / policy.num_layers,
        "reward": None if rewards is None else float(rewards[column]),
    }


def histogram(
    sources: Sequence[str], layers: NDArray[np.int64], insert_layers: Sequence[int]
) -> dict[str, dict[str, int]]:
    """For each source, how many prompts chose each candidate."""
    counts = Counter(zip(sources, layers.tolist(), strict=True))
    return {
        source: {str(layer): counts[source, layer] for layer in insert_layers}
        for source in sorted(set(sources))
    }


def per_prompt(prompt: Prompt, insert_layer: int, probability: float) -> dict[str, Any]:
    """One prompt's line in the result."""
    return {
        "id": prompt.id,
        "source": prompt.source,
        "insert_layer": insert_layer,
        "probability": probability,
    }


def verdict(policy: LayerPolicy, insert_layer: int | None = None) -> str:
    """Whether asking per prompt was worth it on held-out prompts, and whether `insert_layer`, the fixed layer
    recommended, is what the training prompts would have chosen."""
    best, advantage = policy.training.best_fixed, policy.training.advantage
    if advantage is None:
        text = "This policy was not judged on held-out prompts."
    else:
        figures = f"{advantage.mean:+.4f}, 95 % interval {advantage.low:+.4f} to {advantage.high:+.4f}"
        if advantage.low > 0:
            text = (
                "On held-out prompts, choosing a layer for each prompt earned more than the best fixed "
                f"layer, {best} ({figures})."
            )
        else:
            text = (
                "On held-out prompts, choosing a layer for each prompt did not beat the best fixed "
                f"layer, {best} ({figures}): one fixed layer is as good."
            )
    rewards = policy.mean_rewards()
    if insert_layer is None or rewards is None or insert_layer == best:
        return text
    loss = rewards[policy.insert_layers.index(best)] - rewards[policy.insert_layers.index(insert_layer)]
    return (
        f"{text} On the training prompts insert layer {best} earned {loss:.4f} more on average than "
        f"{insert_layer}, the layer nearest to the policy's mean."
    )
