"""A layer study continues after a kill, and its figures are those of the commands that it runs."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deepinsert.controller.finetuning import finetune
from deepinsert.controller.option_checks import check
from deepinsert.controller.options import LayerStudyOptions
from deepinsert.controller.runs.folder import read_result
from deepinsert.controller.studies import layer_study
from deepinsert.controller.studies.layer_study_steps import write_split
from deepinsert.envs.data.instructions import load_instructions
from deepinsert.envs.rewards.table import RewardTable

ROOT = Path(__file__).parents[3]
LAYERS = [0, 3, 6]
CHILD = """
import pickle, sys, torch
from deepinsert.controller.studies import layer_study
if __name__ == "__main__":
    torch.set_num_threads(1)
    layer_study.run(pickle.load(sys.stdin.buffer))
"""


@pytest.fixture(scope="module")
def options(rendered_data: Path, tmp_path_factory: pytest.TempPathFactory) -> LayerStudyOptions:
    return LayerStudyOptions(
        out=tmp_path_factory.mktemp("study") / "run",
        data=rendered_data,
        insert_layers="0,3,6",
        held_out=0.3,
        steps=2,
        batch_size=8,
        learning_rate=3e-3,
        distillation=0,
        skip_weights="0,0.3",
        policy_fraction=1.0,
        device="cpu",
    )


def processes_of(session: int) -> list[int]:
    """Return the running processes of a session."""
    processes = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, IndexError):
            continue
        if entry.name.isdecimal() and int(fields[3]) == session and fields[0] != "Z":
            processes.append(int(entry.name))
    return processes


def finished_steps(out: Path) -> dict[Path, int]:
    """Return the time at which each finished step wrote its result."""
    return {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")}


@pytest.fixture(scope="module")
def interrupted(options: LayerStudyOptions) -> dict[Path, int]:
    """Start the study, stop it while it finetunes its second layer, and return the finished steps."""

    def interrupt(self: finetune.LossLog, *rest: object, **kwargs: object) -> None:
        if self.out.name == "finetune-3":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune.LossLog, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            layer_study.run(options)
    return finished_steps(options.out)


@pytest.fixture(scope="module")
def result(options: LayerStudyOptions, interrupted: dict[Path, int]) -> dict:
    return layer_study.run(options)


def test_finished_steps_are_not_repeated(
    result: dict, interrupted: dict[Path, int], options: LayerStudyOptions
) -> None:
    assert sorted(path.parent.name for path in interrupted) == ["finetune-0", "random"]
    assert finished_steps(options.out).items() >= interrupted.items()


@pytest.mark.slow
def test_a_study_with_several_processes_continues_after_a_kill(
    result: dict, options: LayerStudyOptions, tmp_path: Path
) -> None:
    run = replace(options, out=tmp_path / "run", jobs=2)
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    child = subprocess.Popen(
        [sys.executable, str(script)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert child.stdin is not None
    child.stdin.write(pickle.dumps(run))
    child.stdin.close()
    deadline = time.monotonic() + 300
    done = run.out / "finetune-0" / "result.json"
    while not done.is_file() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert child.returncode == -signal.SIGKILL, "the study ended before it was killed"
    while processes_of(child.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_of(child.pid)  # no process writes to its folders any more
    before = finished_steps(run.out)
    assert before and not (run.out / "result.json").exists()
    again = layer_study.run(run)
    assert finished_steps(run.out).items() >= before.items()
    for one, other in zip(again["by_layer"], result["by_layer"], strict=True):
        assert one["finetuned_loss"]["mean"] == pytest.approx(other["finetuned_loss"]["mean"], rel=1e-3)
        assert one["random_loss"]["mean"] == pytest.approx(other["random_loss"]["mean"], rel=1e-3)


def test_no_image_is_on_both_sides(result: dict, options: LayerStudyOptions) -> None:
    train, held_out = (
        load_instructions(options.out / "data" / f"{part}.json", options.data.parent)
        for part in ("train", "held_out")
    )
    everything = load_instructions(options.data)
    assert not {record.image_key for record in train} & {record.image_key for record in held_out}
    assert all(record.images for record in held_out)
    text = [record for record in everything if not record.images]
    assert len(train) + len(held_out) >= len(everything) - len(text)
    assert result["images"] == len({record.image_key for record in held_out})


def test_figures_are_those_of_the_commands(result: dict, options: LayerStudyOptions) -> None:
    assert [row["insert_layer"] for row in result["by_layer"]] == LAYERS
    sweep = read_result(options.out / "sweep")["by_layer"]
    finetuned = read_result(options.out / "evaluate-finetuned")["variants"]
    shared = read_result(options.out / "evaluate-random")["variants"]
    for row, zero_shot, variant, fixed in zip(result["by_layer"], sweep, finetuned, shared, strict=True):
        for kind, expected in (("zero_shot", zero_shot), ("finetuned", variant), ("random", fixed)):
            assert expected["insert_layer"] == row["insert_layer"]
            for metric in ("loss", "accuracy"):
                figure = row[f"{kind}_{metric}"]
                assert figure["mean"] == pytest.approx(expected[metric], abs=1e-9)
                assert figure["interval"][0] <= figure["mean"] <= figure["interval"][1]
        assert row["flops_ratio"] == zero_shot["flops_ratio"]
    trained = read_result(options.out / "random")
    assert trained["trained_layers"] == LAYERS and trained["steps"] == options.steps
    differences = [entry["mean"] for entry in result["shared"]["random"]["accuracy_difference"]]
    expected = [one["accuracy"] - two["accuracy"] for one, two in zip(shared, finetuned, strict=True)]
    assert differences == pytest.approx(expected)
    assert list(result["shared"]) == ["random"]


def test_picks_and_regret_follow_from_the_figures(result: dict, options: LayerStudyOptions) -> None:
    table = RewardTable.load(options.out / "sweep" / "table", LAYERS)
    finetuned = np.array([row["finetuned_loss"]["mean"] for row in result["by_layer"]])
    expected = np.array([row["expected_loss"] for row in result["by_layer"]])
    assert [entry["skip_weight"] for entry in result["by_skip_weight"]] == [0.0, 0.3]
    for entry in result["by_skip_weight"]:
        bonus = entry["skip_weight"] * np.array(LAYERS) / 8
        truth = bonus - finetuned
        for name, loss in (("zero_shot", table.losses.mean(axis=0)), ("policy", expected)):
            column = int((bonus - loss).argmax())
            assert entry[name]["picked"] == LAYERS[column]
            assert entry[name]["best"] == LAYERS[int(truth.argmax())]
            assert entry[name]["regret"] == pytest.approx(truth.max() - truth[column])


def test_a_finished_study_is_not_repeated(result: dict, options: LayerStudyOptions) -> None:
    written = {path: path.stat().st_mtime_ns for path in options.out.rglob("*") if path.name != "config.json"}
    assert layer_study.run(replace(options, jobs=7)) == result
    assert written == {path: path.stat().st_mtime_ns for path in written}
    assert (options.out / "layer_study.png").stat().st_size > 10_000
    page = (options.out / "layer_study.md").read_text()
    assert "| 6 |" in page and "Spearman" in page and "nan" not in page


def test_a_study_with_other_options_is_refused(result: dict, options: LayerStudyOptions) -> None:
    with pytest.raises(ValueError, match="--steps 2, now 3"):
        layer_study.run(replace(options, steps=3))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"skip_weights": "0,-1"}, "--skip-weights '0,-1': give numbers"),
        ({"skip_weights": "much"}, "--skip-weights 'much': give numbers"),
        ({"jobs": 0}, "--jobs 0: give at least 1"),
        ({"longer": 0}, "--longer 0: give at least 1"),
        ({"policy_fraction": 0.0}, "--policy-fraction 0.0: give a share"),
        ({"distillation": 2.0}, "--distillation 2.0: give a weight"),
    ],
)
def test_unusable_options_are_refused(
    options: LayerStudyOptions, changed: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check(replace(options, **changed))


def test_a_ranking_needs_three_layers(options: LayerStudyOptions, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--insert-layers '0,4': give at least 3 layers"):
        layer_study.run(replace(options, out=tmp_path / "two", insert_layers="0,4"))


def test_json_lines_are_split_too(options: LayerStudyOptions, tmp_path: Path) -> None:
    lines = tmp_path / "instructions.jsonl"
    records = json.loads(options.data.read_text())
    lines.write_text("".join(json.dumps(record) + "\n" for record in records))
    changed = replace(options, out=tmp_path / "out", data=lines, image_root=options.data.parent)
    parts = [json.loads(path.read_text()) for path in write_split(changed)]
    assert all(record in records for part in parts for record in part)
    assert len(parts[0]) > len(parts[1]) > 0
