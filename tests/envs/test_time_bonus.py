"""Prefill times: ratios of paired rounds against layer 0, on a clock that advances by the rows of layers."""

from __future__ import annotations

import copy
import dataclasses
from itertools import pairwise

import pytest

from deepinsert.backbones import Backbone
from deepinsert.backbones.families import find_stack
from deepinsert.envs import load_instructions, prompts_from
from deepinsert.envs.rewards import time_bonus
from deepinsert.envs.rewards.time_bonus import WARM_UP, measure_times


class RowClock:
    """A clock that advances by `seconds` for each row that a decoder layer computes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.seconds = 1.0

    def add_rows(self, rows: int) -> None:
        self.now += self.seconds * rows


@pytest.fixture(scope="module")
def prompts(rendered_data):
    return [prompt for prompt in prompts_from(load_instructions(rendered_data)) if prompt.images]


@pytest.fixture
def clock(monkeypatch) -> RowClock:
    row_clock = RowClock()
    monkeypatch.setattr(time_bonus, "perf_counter", lambda: row_clock.now)
    return row_clock


@pytest.fixture
def clocked_backbone(tiny_backbone, clock) -> Backbone:
    """The tiny backbone, whose layers advance the clock."""
    backbone = dataclasses.replace(tiny_backbone, model=copy.deepcopy(tiny_backbone.model))
    for layer in find_stack(backbone.model).layers:
        layer.register_forward_pre_hook(lambda module, args: clock.add_rows(args[0].shape[:2].numel()))
    return backbone


def test_ratios_are_the_times_divided_by_the_time_of_layer_0(clocked_backbone, prompts):
    layers = (0, 4, 8)
    times = measure_times(clocked_backbone, prompts[:1], layers, repeats=3)
    ids = prompts[0].to_generate(clocked_backbone.processor, prompts[:1])["input_ids"][0].tolist()
    text = sum(token not in clocked_backbone.placeholder_ids for token in ids) / len(ids)
    assert text < 0.5
    assert times.ratios == pytest.approx([(layer * text + 8 - layer) / 8 for layer in layers])
    assert times.low == times.ratios == times.high and times.ratios[0] == 1


def test_layer_0_is_measured_though_it_is_no_candidate(clocked_backbone, prompts):
    batches = {"batch_size": 2, "repeats": 1}
    without, with_stock = (
        measure_times(clocked_backbone, prompts, layers, **batches) for layers in ([8], [0, 8])
    )
    assert without.ratios == with_stock.ratios[1:] and len(without.ratios) == 1
    assert without.low == without.ratios == without.high


def test_load_of_a_whole_round_changes_no_ratio(clocked_backbone, clock, prompts, monkeypatch):
    quiet = measure_times(clocked_backbone, prompts[:1], (0, 4, 8), repeats=4)
    forwards = []

    def slower_every_round(backbone, inputs, insert_layer):
        forwards.append(insert_layer)
        clock.seconds = 1.0 + (len(forwards) - 1) // 3
        return prefill_seconds(backbone, inputs, insert_layer)

    prefill_seconds = time_bonus.prefill_seconds
    monkeypatch.setattr(time_bonus, "prefill_seconds", slower_every_round)
    assert measure_times(clocked_backbone, prompts[:1], (0, 4, 8), repeats=4) == quiet
    rounds = [forwards[start : start + 3] for start in range(0, len(forwards), 3)]
    assert len(rounds) == 4 + WARM_UP
    assert all(first == second[::-1] for first, second in pairwise(rounds))


def test_impossible_measurements_are_refused(tiny_backbone, prompts):
    with pytest.raises(ValueError, match="no prompts"):
        measure_times(tiny_backbone, [], [0])
    with pytest.raises(ValueError, match="repeats 0"):
        measure_times(tiny_backbone, prompts, [0], repeats=0)
    with pytest.raises(ValueError, match="insert layer"):
        measure_times(tiny_backbone, prompts, [9], repeats=1)
