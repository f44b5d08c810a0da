"""Variants compared with the baseline, over all prompts and by source: every figure of `result.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepinsert.controller.metrics.benchmark import Benchmark, Example, Score, question_rows
from deepinsert.controller.statistics import mcnemar, mean_interval, paired_interval, percentile_interval
from deepinsert.envs.prompts import Prompt

from .resampled_scores import ResampledScores
from .timing import Timing, measure_cache, time_variants
from .variants import Variant

ALL = ""
"""The group of all prompts; no source has an empty name."""
CACHE_SAMPLE = 16
"""The number of prompts per source whose KV cache is measured."""

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Predictions:
    """The outcome of a variant on P prompts.

    Attributes:
        answers: the answers (P).
        score: the benchmark's score of the answers.
        losses: the losses in nats (P); NaN where there is no reference answer.
        flops: the prefill FLOPs (P, 2) at the variant's insert layer and at layer 0.
    """

    answers: list[str]
    score: Score
    losses: FloatArray
    flops: FloatArray


@dataclass(frozen=True)
class Comparison:
    """All measurements of V variants on P prompts; the first variant is the baseline.

    Attributes:
        variants: the variants (V).
        benchmark: the benchmark, with its rule.
        examples: its questions (P).
        predictions: the outcome of each variant (V).
        groups: rows of prompts: those of each source, and all under `ALL`.
        timings: the timing of each variant (V) on one batch of a group, by group.
        caches: for each variant (V), the bytes (sampled prompts, 2) of the KV cache as measured and by the
            formula, by source.
        score_samples: the number of bootstrap samples of scores that are not means.
    """

    variants: Sequence[Variant]
    benchmark: Benchmark
    examples: Sequence[Example]
    predictions: Sequence[Predictions]
    groups: Mapping[str, IntArray]
    timings: Mapping[str, list[Timing]]
    caches: Sequence[Mapping[str, FloatArray]]
    score_samples: int

    @classmethod
    def measure(
        cls,
        variants: Sequence[Variant],
        benchmark: Benchmark,
        examples: Sequence[Example],
        predictions: Sequence[Predictions],
        *,
        batch_size: int,
        repeats: int,
        max_new_tokens: int,
        score_samples: int,
    ) -> Comparison:
        """Time the variants in turns on a batch of each source, and measure their caches.

        Args:
            variants: the variants (V).
            benchmark: the benchmark, with its rule.
            examples: its questions (P).
            predictions: the outcome of each variant (V).
            batch_size: the number of prompts in a timed batch.
            repeats: the number of timed repeats.
            max_new_tokens: the longest answer.
            score_samples: the number of bootstrap samples of scores that are not means.
        """
        prompts = [example.prompt for example in examples]
        groups = by_source(prompts)
        sources = {name: rows for name, rows in groups.items() if name != ALL}

        # With one source, its batch would be that of all prompts.
        timed_groups = groups if len(sources) > 1 else {ALL: groups[ALL]}
        batches = {name: spread(rows, batch_size) for name, rows in timed_groups.items()}
        timings = time_variants(variants, prompts, batches, repeats, max_new_tokens)
        cache_samples = {name: spread(rows, CACHE_SAMPLE) for name, rows in sources.items()}
        caches = [
            {
                name: measure_cache(
                    variant.backbone, [prompts[row] for row in rows], variant.insert_layers[rows].tolist()
                )
                for name, rows in cache_samples.items()
            }
            for variant in variants
        ]
        return cls(variants, benchmark, examples, predictions, groups, timings, caches, score_samples)

    @property
    def sources(self) -> list[str]:
        """The names of the sources, in order."""
        return [name for name in self.groups if name != ALL]

    def row(self, index: int) -> dict[str, Any]:
        """Return the figures of one variant over all prompts, and per source under `per_source`."""
        variant = self.variants[index]
        return {
            "name": variant.name,
            "path": variant.path,
            "insert_layer": variant.insert_layer,
            "num_layers": variant.backbone.num_layers,
            **({} if variant.policy is None else {"skip_weight": variant.skip_weight}),
            **self.scores(index),
            **self.figures(index, ALL),
            **self.throughput(index),
            "per_source": {name: self.figures(index, name) for name in self.sources},
        }

    def figures(self, index: int, group: str) -> dict[str, Any]:
        """Return the figures of one variant on one group.

        Differences and ratios of time are against the baseline. Intervals are at 95 %, clustered by image.
        FLOPs and cache bytes are means over prompts.
        """
        rows = self.groups[group]
        variant, baseline = self.predictions[index], self.predictions[0]
        flops, stock_flops = variant.flops[rows].mean(axis=0)
        measured_bytes, formula_bytes = self.cache(index, group)
        rows_with_loss = rows[~np.isnan(variant.losses[rows])]
        questions = self.question_rows(group)
        return {
            "prompts": len(rows),
            **self.layers(index, rows),
            **self.mean_and_difference("accuracy", variant.score.items, baseline.score.items, questions),
            "significance": self.significance(index, group),
            **self.mean_and_difference("loss", variant.losses, baseline.losses, rows_with_loss),
            "flops": flops,
            "flops_ratio": flops / stock_flops,
            **self.times(index, group),
            "kv_cache_bytes": measured_bytes,
            "kv_cache_bytes_formula": formula_bytes,
        }

    def layers(self, index: int, rows: IntArray) -> dict[str, Any]:
        """Return the mean layer and the count per layer that a policy chose for prompts with an image."""
        variant = self.variants[index]
        if variant.policy is None:
            return {}
        chosen = variant.insert_layers[[row for row in rows if self.examples[row].prompt.images]]
        counts = {str(layer): int((chosen == layer).sum()) for layer in variant.policy.insert_layers}
        return {"mean_insert_layer": chosen.mean() if len(chosen) else None, "histogram": counts}

    def question_rows(self, group: str) -> IntArray:
        """Return the rows of a group, one per question even if a benchmark asks it several times."""
        return np.intersect1d(self.groups[group], question_rows(self.examples))

    def images(self, rows: IntArray) -> list[str]:
        """Return the image of each row, the cluster of the bootstrap."""
        return [self.examples[row].prompt.image_key for row in rows]

    def mean_and_difference(
        self, name: str, variant: FloatArray | None, baseline: FloatArray | None, rows: IntArray
    ) -> dict[str, Any]:
        """Return a mean and its difference from the baseline, paired by prompt, both with intervals.

        Args:
            name: the name of the figure; the results' keys begin with it.
            variant: the values of the variant (P), if it has any.
            baseline: the values of the baseline (P), if it has any.
            rows: the rows over which the mean is taken; without rows all results are None.
        """
        names = (name, f"{name}_interval", f"{name}_difference", f"{name}_difference_interval")
        if variant is None or baseline is None or not len(rows):
            return dict.fromkeys(names)
        mean = mean_interval(variant[rows], self.images(rows))
        difference = paired_interval(variant[rows], baseline[rows], self.images(rows))
        figures = (mean.mean, [mean.low, mean.high], difference.mean, [difference.low, difference.high])
        return dict(zip(names, figures, strict=True))

    def significance(self, index: int, group: str) -> dict[str, Any] | None:
        """Return McNemar's exact test against the baseline on the same questions.

        It is None for the baseline itself, and if an answer can be partly right; the interval of the
        difference shows the significance then.
        """
        items, baseline_items = self.predictions[index].score.items, self.predictions[0].score.items
        if index == 0 or items is None or baseline_items is None:
            return None
        pair = np.stack([items, baseline_items])[:, self.question_rows(group)]
        if not np.isin(pair, (0, 1)).all():
            return None
        variant, baseline, p_value = mcnemar(*pair)
        return {"test": "McNemar", "only_variant": variant, "only_baseline": baseline, "p_value": p_value}

    def scores(self, index: int) -> dict[str, Any]:
        """Return the benchmark's own score, its difference from the baseline's, intervals, and details."""
        score, baseline = self.predictions[index].score, self.predictions[0].score
        rows = self.question_rows(ALL)
        if is_mean(score, rows) and is_mean(baseline, rows):
            percent, baseline_percent = (100 * np.asarray(each.items)[rows] for each in (score, baseline))
            interval = mean_interval(percent, self.images(rows))
            difference = paired_interval(percent, baseline_percent, self.images(rows))
        else:
            draws, baseline_draws = self.resampled[index], self.resampled[0]
            interval = percentile_interval(score.headline, draws)
            difference = percentile_interval(score.headline - baseline.headline, draws - baseline_draws)
        return {
            "score": score.headline,
            "score_interval": [interval.low, interval.high],
            "score_difference": score.headline - baseline.headline,
            "score_difference_interval": [difference.low, difference.high],
            "unit": score.unit,
            "details": score.details,
        }

    @cached_property
    def resampled(self) -> list[FloatArray]:
        """The benchmark's score of each variant (V) in bootstrap samples of the questions (samples)."""
        scores = ResampledScores(self.benchmark, self.examples, self.score_samples)
        return [
            scores.headlines(predictions.answers, variant.name)
            for predictions, variant in zip(self.predictions, self.variants, strict=True)
        ]

    def throughput(self, index: int) -> dict[str, Any]:
        """Return questions and tokens per second for whole answers to a batch, and peak memory in bytes.

        Memory is measured on CUDA only, and None elsewhere.
        """
        timing = self.timings[ALL][index]
        generations = timing.generations
        rates = {
            "questions_per_second": [timing.batch_size / each.seconds for each in generations],
            "tokens_per_second": [each.tokens / each.seconds for each in generations],
        }
        peaks = [each.peak_bytes for each in generations if each.peak_bytes is not None]
        return medians_and_quartiles(rates) | {"peak_memory_bytes": max(peaks, default=None)}

    def times(self, index: int, group: str) -> dict[str, Any]:
        """Return median times in ms with quartiles, and ratios to the baseline in the same repeats."""
        timings = self.timings.get(group, self.timings[ALL])
        variant, baseline = timings[index], timings[0]
        values: dict[str, Sequence[float] | FloatArray] = {
            "prefill_ms": variant.prefill_ms,
            "decode_ms": variant.decode_ms,
            "time_ratio": np.divide(variant.prefill_ms, baseline.prefill_ms),
            "decode_time_ratio": np.divide(variant.decode_ms, baseline.decode_ms),
        }
        if self.variants[index].policy is not None:
            values["choice_ms"] = variant.choice_ms
        return {"batch_size": variant.batch_size, **medians_and_quartiles(values)}

    def cache(self, index: int, group: str) -> FloatArray:
        """Return the mean bytes (2) of a prompt's KV cache, measured and by the formula.

        A source is weighted by the number of its prompts.
        """
        names = self.sources if group == ALL else [group]
        means = np.array([self.caches[index][name].mean(axis=0) for name in names])
        return np.average(means, axis=0, weights=[len(self.groups[name]) for name in names])


def medians_and_quartiles(values: Mapping[str, Sequence[float] | FloatArray]) -> dict[str, Any]:
    """Return the median of each list of values under its name, and the quartiles under NAME_quartiles."""
    figures: dict[str, Any] = {}
    for name, repeats in values.items():
        low, median, high = np.quantile(repeats, [0.25, 0.5, 0.75])
        figures |= {name: median, f"{name}_quartiles": [low, high]}
    return figures


def is_mean(score: Score, rows: IntArray) -> bool:
    """Return whether a benchmark's score is the mean, in percent, of the scores of its questions `rows`."""
    return score.items is not None and bool(np.isclose(score.headline, 100 * score.items[rows].mean()))


def by_source(prompts: Sequence[Prompt]) -> dict[str, IntArray]:
    """Return the rows of all prompts under `ALL`, and those of each source in the order of names."""
    sources = np.array([prompt.source for prompt in prompts])
    groups = {str(source): np.flatnonzero(sources == source) for source in np.unique(sources)}
    return {ALL: np.arange(len(prompts)), **groups}


def spread(rows: IntArray, count: int) -> IntArray:
    """Return at most `count` of `rows`, evenly spaced."""
    positions = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))
    selected: IntArray = rows[positions]
    return selected
