"""Every command through a subprocess, on the tiny backbone: the whole chain, and what a user may get wrong.

Commands that do not need each other run side by side.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from deepinsert.controller import cli
from deepinsert.envs.data.rendering import render_instructions

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(*words: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "deepinsert.controller.cli", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def deepinsert(*words: object) -> tuple[str, str]:
    """Run a command to its end; what it wrote to stdout and stderr."""
    process = start(*words)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out, err


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return render_instructions(tmp_path_factory.mktemp("cli_data"), images=12, seed=3, questions_per_image=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data) -> Path:
    """A folder in which every command has run, each into a folder of its name."""
    out = tmp_path_factory.mktemp("runs")
    common = ("--data", data, "--batch-size", 8)
    finetune = ("finetune", *common, "--steps", 2, "--lora-rank", 4)
    benched = ("--backbone", "tiny", "--batch-size", 2, "--insert-layers", "0,6", "--cases", "prefill")
    independent = [
        start("sweep", *common, "--insert-layers", "0,4", "--sources", "coco,gqa", "--out", out / "sweep"),
        start("train-policy", *common, "--insert_layers", "0-3", "--steps", 2048, "--out", out / "policy"),
        start(*finetune, "--out", out / "baseline"),
        start(*finetune, "--insert-layer", 3, "--out", out / "variant"),
        start("bench", *benched, "--repeats", 1, "--out", out / "bench"),
    ]
    for process in independent:
        output, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        assert "Run folder: " in output
    variants = ("--variants", out / "baseline", out / "variant")
    dependent = [
        start("recommend", "--policy", out / "policy", "--data", data, "--out", out / "recommend"),
        start("evaluate", *common, *variants, "--timing-repeats", 1, "--out", out / "evaluate"),
    ]
    for process in dependent:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    return out


def result_of(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def test_every_command_leaves_a_whole_run_folder(runs):
    commands = {
        "sweep": "sweep",
        "policy": "train-policy",
        "baseline": "finetune",
        "variant": "finetune",
        "bench": "bench",
        "recommend": "recommend",
        "evaluate": "evaluate",
    }
    for name, command in commands.items():
        config = json.loads((runs / name / "config.json").read_text())
        assert config["command"] == command
        assert config["versions"]["transformers"]
        assert result_of(runs / name)
        assert [path for path in (runs / name).glob("*.png") if path.read_bytes().startswith(b"\x89PNG")]
    assert not list(runs.rglob("*.tmp"))


def test_results_hold_what_is_promised(runs):
    assert result_of(runs / "sweep")["insert_layers"] == [0, 4]
    policy = result_of(runs / "policy")
    assert {"skip_weight", "mean_insert_layer", "mean_depth", "reward"} <= policy.keys()
    assert {"policy", "best_fixed", "oracle", "uniform"} <= policy["reward"].keys()
    advice = result_of(runs / "recommend")
    assert advice["insert_layer"] in range(4)
    assert {"confidence_interval", "expected", "per_prompt"} <= advice.keys()
    finetune = result_of(runs / "variant")
    assert (finetune["insert_layer"], finetune["steps"]) == (3, 2)
    assert Path(finetune["checkpoint"]).is_dir()
    baseline, variant = result_of(runs / "evaluate")["variants"]
    assert (baseline["insert_layer"], variant["insert_layer"]) == (0, 3)
    assert variant["flops_ratio"] < 1 == baseline["flops_ratio"]
    assert variant["kv_cache_bytes"] < baseline["kv_cache_bytes"]
    assert {"accuracy", "loss", "flops", "prefill_ms", "decode_ms"} <= variant.keys()
    measured = result_of(runs / "bench")["cells"][0]["parts"]["prefill"]
    assert [row["insert_layer"] for row in measured] == [None, 0, 6]


def test_one_prompt_gets_a_recommendation(runs, data, tmp_path, capsys):
    image = str(next(data.parent.rglob("*.png")))
    question = ["--prompt", "What color is the circle?", "--image", image]
    cli.main(["recommend", "--policy", str(runs / "policy"), *question, "--out", str(tmp_path / "run")])
    assert result_of(tmp_path / "run")["insert_layer"] in range(4)
    assert f"Run folder: {tmp_path / 'run'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["sweep", "--data", "DATA", "--sources", "vg"], "'vg'"),
        (["sweep", "--data", "BROKEN"], "broken.json"),
        (["sweep", "--data", "DATA", "--image-root", "EMPTY"], "--image-root"),
        (["sweep", "--data", "DATA", "--backbone", "no-such/model"], "no-such/model"),
        (["train-policy", "--data", "DATA", "--insert-layers", "0-99"], "--insert-layers '0-99'"),
        (["finetune", "--data", "DATA", "--insert-layer", "9"], "9"),
        (["recommend", "--policy", "POLICY", "--prompt", "?", "--backbone", "EMPTY"], "empty"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_mistakes_found_in_the_data_or_the_model_are_one_line(words, named, runs, data, tmp_path, capsys):
    """Those that can only be known once the data or the model is there."""
    (tmp_path / "broken.json").write_text('[{"id": 1, "image"')
    (tmp_path / "empty").mkdir()
    places = {
        "DATA": data,
        "BROKEN": tmp_path / "broken.json",
        "EMPTY": tmp_path / "empty",
        "POLICY": runs / "policy",
    }
    with pytest.raises(SystemExit) as ended:
        cli.main([*(str(places.get(word, word)) for word in words), "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("deepinsert: error: ") and named in last


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("sweep", "--data", "nowhere.json"), "--data nowhere.json"),
        (("sweep", "--data", __file__, "--max-bad", "7"), "--max-bad '7'"),
        (("sweep", "--data", __file__, "--insert-layers", "a-b"), "--insert-layers 'a-b'"),
        (("finetune", "--data", __file__, "--backbone", "/no/where"), "--backbone /no/where"),
        (("finetune", "--data", __file__, "--insert-layer", "-1"), "--insert-layer -1"),
    ],
)
def test_mistakes_found_in_the_options_are_one_line(words, named, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("DEEPINSERT_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("deepinsert: error: ") and named in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit):
        cli.main([*words, "--out", str(tmp_path / "run"), "--debug"])
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["nope"], ["sweep", "--out", "x"], ["finetune", "--steps", "many"]])
def test_what_does_not_parse_ends_with_status_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2


def test_an_interrupt_is_quiet(monkeypatch, tmp_path, capsys):
    import deepinsert.controller.demo

    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(deepinsert.controller.demo, "run", interrupt)
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--out", str(tmp_path)])
    assert ended.value.code == 130
    assert capsys.readouterr().err == ""


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch, tmp_path):
    import deepinsert.controller.demo

    def fail(options):
        raise KeyError("a bug")

    monkeypatch.setattr(deepinsert.controller.demo, "run", fail)
    with pytest.raises(KeyError):
        cli.main(["demo", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    "command", [[], *([name] for name in cli.COMMANDS)], ids=lambda words: " ".join(words)
)
def test_help_loads_neither_torch_nor_transformers(command):
    program = (
        "import sys\n"
        "from deepinsert.controller import cli\n"
        "try:\n"
        f"    cli.main({[*command, '--help']!r})\n"
        "except SystemExit as ended:\n"
        "    assert not ended.code\n"
        "print('LOADED', [name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT, check=True
    )
    assert "LOADED []" in found.stdout
    if command:
        assert cli.COMMANDS[command[0]].example.split(" --")[0] in found.stdout
    else:
        assert all(name in found.stdout for name in cli.COMMANDS)


def test_the_examples_parse_and_name_what_the_demo_writes(tmp_path):
    from deepinsert.controller.demo import FULL, STEPS, Demo
    from deepinsert.controller.options import DemoOptions

    demo = Demo(DemoOptions(), Path("runs/demo"), FULL)
    there = {str(demo.data(part)) for part in ("train", "held_out")} | {f"runs/demo/{step}" for step in STEPS}
    there.add("runs/demo/evaluate/predictions/finetune.jsonl")
    for name, command in cli.COMMANDS.items():
        words = shlex.split(command.example)
        assert words[:2] == ["deepinsert", name]
        parsed, options = cli.parse(words[1:])
        assert (parsed, type(options)) == (name, command.options)
        assert all(word in there for word in words if word.startswith("runs/demo"))


def test_version():
    out, _ = deepinsert("--version")
    assert out.startswith("deepinsert ")


def test_the_demo_runs_and_is_not_repeated(tmp_path, capsys):
    out, _ = deepinsert("demo", "--quick", "--out", tmp_path / "demo")
    for step in ("sweep", "train-policy", "recommend", "finetune-baseline", "finetune", "evaluate"):
        assert result_of(tmp_path / "demo" / step), step
        assert (tmp_path / "demo" / step / "config.json").is_file()
    assert (tmp_path / "demo" / "evaluate" / "predictions" / "finetune.jsonl").is_file()
    result = result_of(tmp_path / "demo")
    assert [row["insert_layer"] for row in result["variants"]] == [0, result["insert_layer"]]
    assert "image tokens enter at layer" in out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").glob("*/result.json")}
    (tmp_path / "demo" / "evaluate" / "result.json").unlink()
    cli.main(["demo", "--quick", "--out", str(tmp_path / "demo")])
    again = capsys.readouterr().out
    assert again.count("already finished") == 5
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").glob("*/result.json")}
    assert after.keys() == before.keys()
    assert {path.parent.name for path in before if after[path] != before[path]} == {"evaluate"}
