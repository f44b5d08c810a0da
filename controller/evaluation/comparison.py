"""Variants beside the baseline, over all prompts and by source: every figure of `result.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepinsert.controller.metrics.benchmark import Benchmark, Example, Score, question_rows
from deepinsert.controller.runs.progress_bars import progress_bar
from deepinsert.controller.statistics import (
    bootstrap_scores,
    mcnemar,
    mean_interval,
    paired_interval,
    percentile_interval,
)
from deepinsert.envs.prompts import Prompt

from .timing import Timing, measure_cache, time_variants
from .variants import Variant

ALL = ""  # the group of all prompts; no source has an empty name
CACHE_SAMPLE = 16  # prompts of each source whose cache is weighed


@dataclass(frozen=True)
class Predictions:
    """What a variant made of P prompts: answers, what they earned, and losses in nats (P), NaN where there is
    no reference to compute one on.

    `flops` (P, 2) are those of the prefill at the variant's insert layer and at layer 0.
    """

    answers: list[str]
    score: Score
    losses: NDArray[np.float64]
    flops: NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """All that was measured of V variants on P prompts; the first variant is the baseline.

    `groups` names rows of prompts: each source's, and all under `ALL`. `timings[group][variant]` are of a
    batch of the group, `caches[variant][source]` (sampled prompts, 2) bytes as measured and by the formula.
    """

    variants: Sequence[Variant]
    benchmark: Benchmark
    examples: Sequence[Example]
    predictions: Sequence[Predictions]
    groups: dict[str, NDArray[np.int64]]
    timings: dict[str, list[Timing]]
    caches: list[dict[str, NDArray[np.float64]]]
    score_samples: int
    copies: dict[tuple[int, int], Example] = field(default_factory=dict, repr=False)
    drawn: dict[int, NDArray[np.float64]] = field(default_factory=dict, repr=False)

    @classmethod
    def measure(
        cls,
        variants: Sequence[Variant],
        benchmark: Benchmark,
        examples: Sequence[Example],
        predictions: Sequence[Predictions],
        batch_size: int,
        repeats: int,
        max_new_tokens: int,
        score_samples: int,
    ) -> Comparison:
        """Time the variants in turns on a batch of each source, and weigh their caches."""
        prompts = [example.prompt for example in examples]
        groups = by_source(prompts)
        sources = {name: rows for name, rows in groups.items() if name != ALL}

        # With one source its batch would be that of all prompts.
        timed = groups if len(sources) > 1 else {ALL: groups[ALL]}
        batches = {name: spread(rows, batch_size) for name, rows in timed.items()}
        timings = time_variants(variants, prompts, batches, repeats, max_new_tokens)
        weighed = {name: spread(rows, CACHE_SAMPLE) for name, rows in sources.items()}
        caches = [
            {
                name: np.array(
                    measure_cache(
                        variant.backbone,
                        [prompts[row] for row in rows],
                        variant.insert_layers[rows].tolist(),
                    ),
                    dtype=np.float64,
                )
                for name, rows in weighed.items()
            }
            for variant in variants
        ]
        return cls(variants, benchmark, examples, predictions, groups, timings, caches, score_samples)

    @property
    def sources(self) -> list[str]:
        """Names of the sources, in order."""
        return [name for name in self.groups if name != ALL]

    def row(self, index: int) -> dict[str, Any]:
        """Figures of one variant over all prompts and, under `per_source`, for each source."""
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
        """Figures of one variant on one group; differences and ratios of time are against the baseline.

        Intervals are at 95 %, clustered by image; FLOPs and cache bytes are means over prompts.
        """
        rows = self.groups[group]
        mine, first = self.predictions[index], self.predictions[0]
        flops, stock = mine.flops[rows].mean(axis=0)
        measured, formula = self.cache(index, group)
        known = rows[~np.isnan(mine.losses[rows])]
        return {
            "prompts": len(rows),
            **self.layers(index, rows),
            **self.mean_and_difference("accuracy", mine.score.items, first.score.items, self.asked(group)),
            "significance": self.significance(index, group),
            **self.mean_and_difference("loss", mine.losses, first.losses, known),
            "flops": flops,
            "flops_ratio": flops / stock,
            **self.times(index, group),
            "kv_cache_bytes": measured,
            "kv_cache_bytes_formula": formula,
        }

    def layers(self, index: int, rows: NDArray[np.int64]) -> dict[str, Any]:
        """What a policy chose: mean layer and counts by layer, of the prompts that have an image."""
        variant = self.variants[index]
        if variant.policy is None:
            return {}
        chosen = variant.insert_layers[[row for row in rows if self.examples[row].prompt.images]]
        counts = {str(layer): int((chosen == layer).sum()) for layer in variant.policy.insert_layers}
        return {"mean_insert_layer": chosen.mean() if len(chosen) else None, "histogram": counts}

    def asked(self, group: str) -> NDArray[np.int64]:
        """Rows of a group, one for each question where a benchmark asks it several times."""
        return np.intersect1d(self.groups[group], question_rows(self.examples))

    def clusters(self, rows: NDArray[np.int64]) -> list[str]:
        """The image key of each of the rows, by which the bootstrap draws."""
        return [self.examples[row].prompt.image_key for row in rows]

    def mean_and_difference(
        self,
        name: str,
        mine: NDArray[np.float64] | None,
        first: NDArray[np.float64] | None,
        rows: NDArray[np.int64],
    ) -> dict[str, Any]:
        """A mean with its interval, and how far it lies from the baseline's, prompt by prompt; None for all
        where there is nothing to take a mean of."""
        names = (name, f"{name}_interval", f"{name}_difference", f"{name}_difference_interval")
        if mine is None or first is None or not len(rows):
            return dict.fromkeys(names)
        mean = mean_interval(mine[rows], self.clusters(rows))
        difference = paired_interval(mine[rows], first[rows], self.clusters(rows))
        found = (mean.mean, [mean.low, mean.high], difference.mean, [difference.low, difference.high])
        return dict(zip(names, found, strict=True))

    def significance(self, index: int, group: str) -> dict[str, Any] | None:
        """McNemar's exact test against the baseline on the same questions; None for the baseline itself, and
        where answers earn more than wrong or right: the interval of the difference says it there."""
        mine, first = self.predictions[index].score.items, self.predictions[0].score.items
        if index == 0 or mine is None or first is None:
            return None
        pair = np.stack([mine, first])[:, self.asked(group)]
        if not np.isin(pair, (0, 1)).all():
            return None
        variant, baseline, p_value = mcnemar(*pair)
        return {"test": "McNemar", "only_variant": variant, "only_baseline": baseline, "p_value": p_value}

    def scores(self, index: int) -> dict[str, Any]:
        """The benchmark's own number with its interval, how far it lies from the baseline's, and details."""
        score, first = self.predictions[index].score, self.predictions[0].score
        rows = self.asked(ALL)
        if is_mean(score, rows) and is_mean(first, rows):
            percent, others = (100 * np.asarray(each.items)[rows] for each in (score, first))
            found = mean_interval(percent, self.clusters(rows))
            apart = paired_interval(percent, others, self.clusters(rows))
        else:
            found = percentile_interval(score.headline, self.draws(index))
            apart = percentile_interval(score.headline - first.headline, self.draws(index) - self.draws(0))
        return {
            "score": score.headline,
            "score_interval": [found.low, found.high],
            "score_difference": score.headline - first.headline,
            "score_difference_interval": [apart.low, apart.high],
            "unit": score.unit,
            "details": score.details,
        }

    def draws(self, index: int) -> NDArray[np.float64]:
        """The benchmark's number of a variant for `score_samples` bootstrap draws of the questions."""
        if index not in self.drawn:
            label = f"{self.variants[index].name}: interval of {self.benchmark.name}"
            turns = progress_bar(range(self.score_samples), label)

            def score(drawn: NDArray[np.int64]) -> float:
                next(turns)
                return self.headline(index, drawn)

            every = self.clusters(self.groups[ALL])
            self.drawn[index] = bootstrap_scores(score, len(every), every, self.score_samples)
        return self.drawn[index]

    def headline(self, index: int, drawn: NDArray[np.int64]) -> float:
        """The benchmark's number of a variant for drawn questions, in their order."""
        answers = self.predictions[index].answers
        copies: Counter[int] = Counter()
        chosen = []
        for row in drawn.tolist():
            chosen.append(self.copy(row, copies[row]))
            copies[row] += 1
        return self.benchmark.headline([answers[row] for row in drawn], chosen)

    def copy(self, row: int, number: int) -> Example:
        """An example drawn once more: to a rule that puts questions together, one about another image."""
        example = self.examples[row]
        if number == 0:
            return example
        if (row, number) not in self.copies:
            prompt = example.prompt
            key = f"{prompt.image_key} copy {number}"
            own = replace(prompt, id=f"{prompt.id} copy {number}", image_key=key)
            group = {"group": (example.facts["group"], number)} if "group" in example.facts else {}
            self.copies[row, number] = replace(example, prompt=own, facts={**example.facts, **group})
        return self.copies[row, number]

    def throughput(self, index: int) -> dict[str, Any]:
        """Questions and tokens of text a second in whole answers to a batch, and peak memory in bytes (CUDA
        only, else None)."""
        made = self.timings[ALL][index].generations
        size = self.timings[ALL][index].batch_size
        rates = {
            "questions_per_second": [size / each.seconds for each in made],
            "tokens_per_second": [each.tokens / each.seconds for each in made],
        }
        found: dict[str, Any] = {}
        for name, values in rates.items():
            low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
            found |= {name: median, f"{name}_quartiles": [low, high]}
        peaks = [each.peak_bytes for each in made if each.peak_bytes is not None]
        return found | {"peak_memory_bytes": max(peaks, default=None)}

    def times(self, index: int, group: str) -> dict[str, Any]:
        """Median times in ms with quartiles, and ratios against the baseline in the same repeats."""
        timings = self.timings.get(group, self.timings[ALL])
        mine, first = timings[index], timings[0]
        values = {
            "prefill_ms": np.array(mine.prefill_ms),
            "decode_ms": np.array(mine.decode_ms),
            "time_ratio": np.divide(mine.prefill_ms, first.prefill_ms),
            "decode_time_ratio": np.divide(mine.decode_ms, first.decode_ms),
        }
        if self.variants[index].policy is not None:
            values["choice_ms"] = np.array(mine.choice_ms)
        found: dict[str, Any] = {"batch_size": mine.batch_size}
        for name, measured in values.items():
            low, median, high = np.quantile(measured, [0.25, 0.5, 0.75])
            found |= {name: median, f"{name}_quartiles": [low, high]}
        return found

    def cache(self, index: int, group: str) -> NDArray[np.float64]:
        """Mean bytes of a prompt's cache, measured and by the formula; a source weighs as its prompts do."""
        names = self.sources if group == ALL else [group]
        means = np.array([self.caches[index][name].mean(axis=0) for name in names])
        return np.average(means, axis=0, weights=[len(self.groups[name]) for name in names])


def is_mean(score: Score, rows: NDArray[np.int64]) -> bool:
    """Whether a benchmark's number is the mean, in percent, of what questions (at `rows`) earn."""
    return score.items is not None and bool(np.isclose(score.headline, 100 * score.items[rows].mean()))


def by_source(prompts: Sequence[Prompt]) -> dict[str, NDArray[np.int64]]:
    """Rows of all prompts, under `ALL`, and of those of each source, in order of name."""
    sources = np.array([prompt.source for prompt in prompts])
    groups = {str(source): np.flatnonzero(sources == source) for source in np.unique(sources)}
    return {ALL: np.arange(len(prompts)), **groups}


def spread(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """At most `count` of `rows`, evenly spaced."""
    places = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))
    chosen: NDArray[np.int64] = rows[places]
    return chosen
