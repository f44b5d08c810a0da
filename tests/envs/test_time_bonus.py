"""Prefill times: of what the layers are given, in paired rounds, and sensible bounds."""

from __future__ import annotations

import copy
import dataclasses
import time

import pytest

from deepinsert.backbones import Backbone
from deepinsert.backbones.families import find_stack
from deepinsert.envs import load_instructions, prompts_from
from deepinsert.envs.rewards.time_bonus import measure_times

PER_ROW = 3e-4


@pytest.fixture(scope="module")
def prompts(rendered_data):
    return [prompt for prompt in prompts_from(load_instructions(rendered_data)) if prompt.images]


@pytest.fixture(scope="module")
def waiting(tiny_backbone) -> Backbone:
    """The tiny backbone, slowed by a wait in each layer for each row it is given: a known time."""
    backbone = dataclasses.replace(tiny_backbone, model=copy.deepcopy(tiny_backbone.model))
    for layer in find_stack(backbone.model).layers:
        layer.register_forward_pre_hook(lambda module, args: time.sleep(PER_ROW * args[0].shape[1]))
    return backbone


def test_times_follow_the_rows_that_layers_are_given(waiting, prompts):
    layers = (0, 4, 8)
    times = measure_times(waiting, prompts[:1], layers, repeats=3)
    ids = prompts[0].to_generate(waiting.processor, prompts[:1])["input_ids"][0].tolist()
    text = sum(token not in waiting.placeholder_ids for token in ids) / len(ids)
    assert text < 0.5
    for layer, ratio in zip(layers, times.ratios, strict=True):
        assert ratio == pytest.approx((layer * text + 8 - layer) / 8, abs=0.2)
    assert times.ratios[0] == times.low[0] == times.high[0] == 1
    for low, middle, high in zip(times.low, times.ratios, times.high, strict=True):
        assert low <= middle <= high


def test_layer_0_is_the_measure_though_it_is_no_candidate(waiting, prompts):
    times = measure_times(waiting, prompts, [8], batch_size=2, repeats=1)
    assert len(times.ratios) == 1 and times.low == times.ratios == times.high
    assert 0 < times.ratios[0] < 0.9


def test_what_cannot_be_measured_is_refused(tiny_backbone, prompts):
    with pytest.raises(ValueError, match="no prompts"):
        measure_times(tiny_backbone, [], [0])
    with pytest.raises(ValueError, match="repeats 0"):
        measure_times(tiny_backbone, prompts, [0], repeats=0)
    with pytest.raises(ValueError, match="insert layer"):
        measure_times(tiny_backbone, prompts, [9], repeats=1)
