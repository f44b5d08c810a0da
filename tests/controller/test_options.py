"""Options are parsed and checked before anything is loaded, without torch; errors name the wrong value."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from deepinsert.controller import options
from deepinsert.controller.option_checks import (
    check,
    parse_layers,
    parse_observation,
    parse_share,
    parse_skip_weights,
    parse_sources,
)
from deepinsert.controller.options import (
    EvaluateOptions,
    FinetuneOptions,
    RecommendOptions,
    SweepOptions,
    TrainPolicyOptions,
)


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "instructions.json"
    path.write_text("[]")
    return path


@pytest.mark.parametrize(
    ("text", "layers"),
    [("all", (0, 1, 2, 3)), ("0-2", (0, 1, 2)), ("2,0", (0, 2)), ("0-1,4", (0, 1, 4)), (" 1 , 1-2 ", (1, 2))],
)
def test_layers_are_parsed(text, layers):
    assert parse_layers(text, 4) == layers


@pytest.mark.parametrize(
    "text", ["", "x", "1-", "-1", "2-1", "0-9", "1;2", "1.5", "0--1", "¹", "0-999999999999"]
)
def test_invalid_layers_are_refused(text):
    with pytest.raises(ValueError, match="--insert-layers"):
        parse_layers(text, 4)


@pytest.mark.parametrize(("text", "share"), [("0.5%", 0.005), ("0.005", 0.005), ("0", 0), ("100%", 1)])
def test_shares_are_parsed(text, share):
    assert parse_share(text, "--max-bad") == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "%", "half", "-1%", "101%", "1.5", "nan", "inf"])
def test_invalid_shares_are_refused(text):
    with pytest.raises(ValueError, match="--max-bad"):
        parse_share(text, "--max-bad")


@pytest.mark.parametrize(("text", "layer"), [("embeddings", 0), ("hidden:1", 1), (" hidden:12 ", 12)])
def test_observations_are_parsed(text, layer):
    assert parse_observation(text) == layer


@pytest.mark.parametrize(
    "text",
    ["", "hidden", "hidden:", "hidden:0", "hidden:-1", "hidden:x", "hidden:99999", "embeddings:1"],
)
def test_invalid_observations_are_refused(text):
    with pytest.raises(ValueError, match="--observation"):
        parse_observation(text)


def test_sources_are_parsed():
    assert parse_sources("coco, gqa,") == ("coco", "gqa")
    assert parse_sources("") is None


def test_valid_options_pass(data, tmp_path):
    (tmp_path / "policy.json").write_text("{}")
    (tmp_path / "result.json").write_text("{}")
    check(SweepOptions(out=tmp_path, data=data, insert_layers="0-7,9"))
    check(TrainPolicyOptions(out=tmp_path, data=data, fraction=0.1, max_bad="2%"))
    check(RecommendOptions(out=tmp_path, policy=tmp_path, prompt="What is this?"))
    check(RecommendOptions(out=tmp_path, policy=tmp_path, data=data))
    check(FinetuneOptions(out=tmp_path, data=data, insert_layer=3))
    check(EvaluateOptions(out=tmp_path, data=data, variants=(tmp_path, tmp_path)))
    check(EvaluateOptions(out=tmp_path, data=data, policy=tmp_path, skip_weight=0.3))
    check(EvaluateOptions(out=tmp_path, data=data, insert_layers="0,3"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda data: SweepOptions(out=data, data=data.parent / "no.json"), "--data .*no.json"),
        (lambda data: SweepOptions(out=data, data=data, image_root=data), "--image-root"),
        (lambda data: SweepOptions(out=data, data=data, insert_layers="3-z"), "--insert-layers '3-z'"),
        (lambda data: SweepOptions(out=data, data=data, max_bad="7"), "--max-bad '7'"),
        (lambda data: SweepOptions(out=data, data=data, fraction=0.0), "--fraction 0.0"),
        (lambda data: SweepOptions(out=data, data=data, fraction=float("nan")), "--fraction nan"),
        (lambda data: SweepOptions(out=data, data=data, batch_size=0), "--batch-size 0"),
        (lambda data: SweepOptions(out=data, data=data, backbone="./no"), "--backbone ./no"),
        (lambda data: TrainPolicyOptions(out=data, data=data, skip_weight=-1), "--skip-weight -1"),
        (lambda data: TrainPolicyOptions(out=data, data=data, skip_weight=float("inf")), "--skip-weight inf"),
        (lambda data: TrainPolicyOptions(out=data, data=data, held_out=1), "--held-out 1"),
        (lambda data: TrainPolicyOptions(out=data, data=data, observation="hiden:2"), "--observation"),
        (lambda data: FinetuneOptions(out=data, data=data, insert_layer=-1), "--insert-layer -1"),
        (lambda data: FinetuneOptions(out=data, data=data, steps=0), "--steps 0"),
        (lambda data: EvaluateOptions(out=data, data=data, variants=(data.parent,)), "--variants"),
        (lambda data: EvaluateOptions(out=data, data=data, policy=data.parent), "--policy .*policy.json"),
        (lambda data: EvaluateOptions(out=data, data=data, skip_weight=0.1), "--skip-weight 0.1.*--policy"),
        (lambda data: EvaluateOptions(out=data, data=data, insert_layers="x"), "--insert-layers 'x'"),
        (lambda data: RecommendOptions(out=data, policy=data.parent, prompt="?"), "--policy"),
        (lambda data: RecommendOptions(out=data, policy=data.parent), "--prompt .* or --data"),
        (
            lambda data: RecommendOptions(out=data, policy=data, prompt="?", data=data),
            "--prompt .* or --data",
        ),
    ],
)
def test_errors_name_the_wrong_value(make, message, data):
    with pytest.raises(ValueError, match=message):
        check(make(data))


def test_every_option_has_a_description():
    """`--help` shows the docstring of each option."""
    lines = Path(options.__file__).read_text("utf-8").splitlines()
    for kind in vars(options).values():
        if isinstance(kind, type) and kind.__name__.endswith("Options"):
            for field in fields(kind):
                places = [index for index, line in enumerate(lines) if line.startswith(f"    {field.name}: ")]
                assert places and all(lines[index + 1].strip().startswith('"""') for index in places), (
                    field.name
                )


def test_importing_options_loads_no_torch():
    program = (
        "import sys, deepinsert.controller.options; "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert process.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("text", "weight", "ends"),
    [
        ("auto", 0.5, (0, 1)),
        ("auto", 0.0, (0, 1)),
        ("none", 0.3, (0.3, 0.3)),
        ("0-2", 0.5, (0, 2)),
        ("0.1-0.5", 0.5, (0.1, 0.5)),
    ],
)
def test_ranges_of_skip_weights_are_parsed(text, weight, ends):
    assert parse_skip_weights(text, weight) == ends


@pytest.mark.parametrize("text", ["", "1", "2-1", "1-1", "-1-2", "0-inf", "nan-1", "a-b", "all"])
def test_invalid_ranges_of_skip_weights_are_refused(data, tmp_path, text):
    with pytest.raises(ValueError, match="--skip-weight-range"):
        check(TrainPolicyOptions(out=tmp_path, data=data, skip_weight_range=text))


def test_a_range_without_the_skip_weight_is_refused(data, tmp_path):
    command_options = TrainPolicyOptions(out=tmp_path, data=data, skip_weight=3, skip_weight_range="0-2")
    with pytest.raises(ValueError, match="'0-2' does not contain --skip-weight 3"):
        check(command_options)
