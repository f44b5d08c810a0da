"""`deepinsert bench`: complete results, resumed cells, right arithmetic, published sizes, clear errors.

No test asserts a measured time.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import sdpa_flop_count

from deepinsert.backbones import CostModel, deep_insert, remove_deep_insert
from deepinsert.backbones.costs.encoder_costs import flop_counter
from deepinsert.backbones.families import find_stack
from deepinsert.controller import cli
from deepinsert.controller.finetuning.recipe import make_trainable
from deepinsert.controller.options import FinetuneOptions
from deepinsert.controller.performance import ideal_ratios as ideal
from deepinsert.controller.performance.arms import Duration, Samples, compare, saving_kept, take_turns
from deepinsert.controller.performance.goals import verdict
from deepinsert.controller.performance.grids import PER_ROW, Cell, full_grid, quick_grid
from deepinsert.controller.performance.host_syncs import find_syncs
from deepinsert.controller.performance.measured_cases import measure
from deepinsert.controller.performance.performance_page import write_document
from deepinsert.controller.performance.published_configurations import PUBLISHED_MODELS
from deepinsert.controller.performance.random_models import build_bench_model
from deepinsert.controller.performance.sample_batches import make_batch, tokens_per_image

ROOT = Path(__file__).parents[3]
TINY = ("bench", "--backbone", "bench-tiny", "--batch-size", "2", "--repeats", "1")


def gpu_benchmark():
    """Import `benchmarks/gpu.py`, which is in no package, as a module."""
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_benchmark"] = module  # dataclasses look up their types here
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Finish a run of every case on the smallest model; returns its folder."""
    out = tmp_path_factory.mktemp("bench")
    cli.main([*TINY, "--insert-layers", "0,2", "--out", str(out)])
    return out


def result_of(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def tiny_model():
    return build_bench_model("bench-tiny")


def test_a_run_holds_every_case_with_its_ideal_and_its_machine(run):
    result = result_of(run)
    cases = {cell["case"] for cell in result["cells"]}
    assert cases == {"prefill", "decode", "train-full", "train-lora", "rows", "ragged", "mixed"}
    assert {"prefill", "decode", "forward_backward", "step"} == {
        part for cell in result["cells"] for part in cell["parts"]
    }
    for cell in result["cells"]:
        assert cell["machine"]["cpu"] and cell["model"] == "bench-tiny" and "4 layers" in cell["model_size"]
        for rows in cell["parts"].values():
            assert rows[0]["insert_layer"] is None
            assert rows[0]["time_ratio"] == rows[0]["ideal_ratio"] == 1
            assert all(0 < row["ideal_ratio"] <= 1 and row["ms"] > 0 for row in rows)
            if cell["case"] != "rows":
                assert [row["insert_layer"] for row in rows] == [None, 0, 2]
    for name in ("figure12.png", "saving_kept.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")


def test_the_cache_holds_the_bytes_of_the_formula(run):
    rows = [
        row
        for cell in result_of(run)["cells"]
        if cell["case"] == "prefill"
        for row in cell["parts"]["prefill"]
    ]
    assert rows and all(row["kv_cache_bytes"] == row["kv_cache_bytes_formula"] for row in rows)


def test_the_same_command_measures_only_the_cells_that_are_missing(run, tmp_path):
    out = tmp_path / "run"
    words = [*TINY, "--insert-layers", "0,2", "--cases", "prefill", "--out", str(out)]
    cli.main(words)
    cells = sorted((out / "cells").iterdir())
    before = {path: path.read_bytes() for path in cells}
    (out / "result.json").unlink()
    cells[0].unlink()
    foreign = json.loads(before[cells[1]])
    foreign["machine"]["cpu"] = "another"
    cells[1].write_text(json.dumps(foreign))
    cli.main(words)
    assert cells[0].is_file() and json.loads(cells[1].read_text())["machine"]["cpu"] != "another"
    assert all(path.read_bytes() == before[path] for path in cells[2:])
    assert len(result_of(out)["cells"]) == len(cells) > 2


def test_a_users_model_is_measured_on_rendered_images(tmp_path):
    words = ["bench", "--backbone", "tiny", "--batch-size", "2", "--repeats", "1", "--insert-layers", "0,6"]
    cli.main([*words, "--out", str(tmp_path)])
    result = result_of(tmp_path)
    assert [cell["case"] for cell in result["cells"]] == ["prefill", "decode", "rows"]
    assert result["cells"][0]["multimodal_tokens"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--cases", "prefil"), "'prefil'"),
        (("--repeats", "0"), "--repeats 0"),
        (("--threads", "0"), "--threads 0"),
        (("--insert-layers", "5"), "'5'"),
        (("--backbone", "tiny", "--cases", "ragged"), "--cases ragged"),
        (("--backbone", "/no/where"), "--backbone /no/where"),
    ],
)
def test_mistakes_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*TINY[:3], *words, "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert last_line.startswith("deepinsert: error: ") and message in last_line


def test_the_share_kept_of_a_saving():
    # Of 40 % that could be saved, 38 % and 20 % were; without a possible saving there is no share.
    assert saving_kept(0.62, 0.6) == pytest.approx(0.95)
    assert saving_kept(0.8, 0.6) == pytest.approx(0.5)
    assert saving_kept(1.1, 0.6) == pytest.approx(-0.25)
    assert saving_kept(1.0, 1.0) is None
    # The paper's code, 0.836 where eq. (5) allows 0.661: less than half of the saving.
    assert saving_kept(0.836, 0.661) == pytest.approx(0.4838, abs=1e-4)


def test_ratios_are_taken_within_a_round():
    # The second round ran on a machine twice as slow; the arm takes 60, 50 and 80 % of its round's stock.
    wall = np.array([[100.0, 60.0], [200.0, 100.0], [100.0, 80.0]])
    stock, arm = compare(Samples(wall, wall / 2), [1.0, 0.5])
    assert stock["time_ratio"] == 1 and stock["saving_kept"] is None
    assert arm["time_ratio"] == pytest.approx(0.6) and arm["ms"] == 80
    assert arm["time_ratio_quartiles"] == pytest.approx([0.55, 0.7])
    assert arm["saving_kept"] == pytest.approx(0.8) and arm["over_ideal"] == pytest.approx(0.2)


def test_arms_take_turns_in_alternating_order():
    order: list[int] = []

    def arm(number: int):
        def run() -> dict[str, Duration]:
            order.append(number)
            return {"part": Duration(10.0 * number, number)}

        return run

    samples = take_turns([arm(number) for number in range(3)], repeats=3, warm_up=[0])
    assert order == [0, 0, 1, 2, 2, 1, 0, 0, 1, 2]
    assert samples["part"].wall.tolist() == [[0, 10, 20]] * 3


@pytest.mark.parametrize(
    ("case", "part", "row", "state"),
    [
        ("prefill", "prefill", {"insert_layer": 0, "time_ratio": 1.02}, "missed"),
        ("prefill", "prefill", {"insert_layer": 8, "ideal_ratio": 0.5, "time_ratio": 0.525}, "met"),
        (
            "train-full",
            "forward_backward",
            {"insert_layer": 8, "ideal_ratio": 0.5, "time_ratio": 0.56},
            "missed",
        ),
        ("rows", "prefill", {"insert_layer": [0, 8], "ideal_ratio": 0.6, "time_ratio": 0.62}, "met"),
        ("decode", "decode", {"insert_layer": 8, "ideal_ratio": 0.9, "time_ratio": 0.99}, "met"),
    ],
)
def test_rows_are_compared_with_the_goal_of_their_case(case, part, row, state):
    whole = {"ideal_ratio": 1.0, "saving_kept": 1.0, **row}
    result = verdict(case, part, {**whole, "time_ratio_quartiles": [whole["time_ratio"]] * 2})
    assert result is not None and result.state == state
    assert verdict(case, part, {**whole, "insert_layer": None, "time_ratio_quartiles": [1, 1]}) is None


def test_grids_cover_the_documented_sizes():
    full = {(cell.rows, cell.text, cell.multimodal) for cell in full_grid() if cell.case == "prefill"}
    assert full == {(b, t, m) for b in (1, 8, 32) for t in (64, 128) for m in (576, 2304)}
    for grid in (quick_grid(), full_grid()):
        assert len({cell.key for cell in grid}) == len(grid)
    cell = Cell("rows", "bench", 8, 64, 576, PER_ROW, 1)
    assert cell.settings(16) == ((0, 4, 8, 12) * 2, (4, 4, 12, 12) * 2, 8)
    assert Cell("ragged", "bench", 4, 64, 576, (0.5,), 1).texts() == [16, 32, 48, 64]
    assert Cell("mixed", "bench", 4, 64, 2304, (0.5,), 1).images(576) == [4, 0, 4, 0]


def test_prefill_costs_what_the_flop_counter_counts(tiny_model):
    """The batch is padded: a row of 8 text tokens beside one of 16, and a row without an image."""
    batch = make_batch(tiny_model, [16, 8, 16], [1, 1, 0])
    assert (batch.rows, batch.length, batch.text, batch.images) == (3, 16 + 64, 16, 2)
    costs = CostModel.from_model(tiny_model)
    for layer in (0, 2, 4):
        deep_insert(tiny_model, layer)
        counter = flop_counter()
        with torch.no_grad(), counter:
            tiny_model(**batch.inputs, logits_to_keep=1)
        counted = counter.get_total_flops()
        assert ideal.prefill_flops(costs, batch, layer) == pytest.approx(counted, rel=0.01)
    remove_deep_insert(tiny_model)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_training_step_costs_what_the_flop_counter_counts(method):
    model = build_bench_model("bench-tiny")
    batch = make_batch(model, [16, 16], [1, 1])
    costs, projector = CostModel.from_model(model), ideal.projector_flops(model)
    trained = make_trainable(model, FinetuneOptions(out=Path(), data=Path(), method=method, lora_rank=4))
    counter = flop_counter()
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def attention_backward(gradient, query, key, value, *arguments, out_val=None, **options):
        return ideal.ATTENTION_BACKWARD * sdpa_flop_count(query.shape, key.shape, value.shape)

    counter.flop_registry[backward] = attention_backward
    deep_insert(model, 2)
    with counter:
        trained(**batch.inputs, labels=batch.inputs["input_ids"], use_cache=False).loss.backward()
    counted = counter.get_total_flops()
    assert ideal.training_flops(trained, projector, costs, batch, 2) == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("case", ["train-full", "train-lora", "rows", "decode"])
def test_measuring_leaves_the_model_as_it_was(case):
    model = build_bench_model("bench-tiny")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    batch = make_batch(model, [8, 8], [1, 1])
    measure(case, model, CostModel.from_model(model), batch, [(0, 2) if case == "rows" else 2], 1)
    assert not model.training and not hasattr(model.config, "deepinsert")
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED_MODELS)
def test_published_configurations_have_the_published_number_of_weights(name):
    """By hand for LLaVA-1.5-7B: 262.7 M embeddings and head, 32 x 202.4 M layers, 303.5 M CLIP-L, 21.0 M
    projector: 7.063 B."""
    model = PUBLISHED_MODELS[name].build("meta", torch.bfloat16)
    assert sum(weight.numel() for weight in model.parameters()) == PUBLISHED_MODELS[name].weights
    assert model.dtype == torch.bfloat16 and {weight.device.type for weight in model.parameters()} == {"meta"}
    layers = {"llava-1.5-13b": 40, "qwen2.5-vl-7b": 28}
    assert len(find_stack(model).layers) == layers.get(name, 32)
    images = {"llava-next-7b": 576 + 48 * 49}  # the whole image, and 2 x 2 tiles with a newline per row
    assert tokens_per_image(model) == images.get(name, 576)


def test_an_insert_layer_adds_at_most_one_wait_of_the_host():
    model = PUBLISHED_MODELS["llava-1.5-7b"].build("cpu", torch.float32, "tiny")
    batch = make_batch(model, [8], [1])
    stock, shallow, deep = (find_syncs(model, batch, layer) for layer in (None, 0, 8))
    assert shallow["operations"] == stock["operations"]
    ours = [entry for entry in deep["operations"] if entry["line"].startswith("mechanism/")]
    assert sum(entry["times"] for entry in ours) <= 1


def test_the_gpu_benchmark_runs_on_a_cpu_at_tiny_scale(tmp_path, capsys):
    out = tmp_path / "gpu"
    words = ["--device", "cpu", "--scale", "tiny", "--models", "llava-1.5-7b", "--repeats", "1"]
    sizes = ["--text", "16", "--batch-sizes", "1", "--insert-layers", "0,8"]
    gpu_benchmark().main([*words, *sizes, "--out", str(out)])
    printed = capsys.readouterr().out
    assert "0.881" in printed and "<= 0.81" in printed and "say nothing" in printed
    cells = result_of(out)["cells"]
    assert [cell["case"] for cell in cells] == ["prefill", "decode", "train-lora"]
    assert all((cell["model"], cell["attention"]) == ("llava-1.5-7b", "sdpa") for cell in cells)
    assert (out / "figure12.png").is_file() and (out / "saving_kept.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--device", "cpu"), "--scale tiny"),
        (("--models", "llava-2"), "--models llava-2"),
        (("--device", "cpu", "--scale", "tiny", "--attention", "flash_nowhere"), "none can run here"),
        *([] if torch.cuda.is_available() else [((), "no CUDA device")]),
    ],
)
def test_the_gpu_benchmark_names_what_is_missing(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_benchmark().main([*words, "--out", str(tmp_path / "run")])
    errors = capsys.readouterr().err
    assert ended.value.code == 2 and message in errors and "Traceback" not in errors
    assert not (tmp_path / "run" / "result.json").exists()


def test_the_gpu_benchmark_lists_what_makes_the_host_wait(tmp_path, capsys):
    words = ["--device", "cpu", "--scale", "tiny", "--models", "qwen2.5-vl-7b", "--profile"]
    gpu_benchmark().main([*words, "--out", str(tmp_path)])
    assert "insert layer 8" in capsys.readouterr().out
    stock, shallow, deep = json.loads((tmp_path / "host_syncs.json").read_text())["qwen2.5-vl-7b"]
    assert (stock["insert_layer"], shallow["insert_layer"], deep["insert_layer"]) == (None, 0, 8)
    assert stock["operations"] and deep["events"]


def test_the_document_is_written_from_a_run(run, tmp_path):
    text = write_document([run], tmp_path).read_text()
    assert result_of(run)["machine"]["cpu"] in text
    assert "| insert layer |" in text and "saving kept" in text
    for name in ("figure12", "saving_kept"):
        picture = tmp_path / f"performance/{run.name}-{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert f"performance/{run.name}-{name}.png" in text
    with pytest.raises(FileNotFoundError, match="not the folder of a finished run"):
        write_document([tmp_path / "nowhere"], tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "result.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no measured cells"):
        write_document([tmp_path / "other"], tmp_path)
