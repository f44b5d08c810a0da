"""`deepinsert predict` from a folder that holds only a config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepinsert.backbones import CostModel, load_backbone
from deepinsert.controller import cli

LLAVA = {
    "model_type": "llava",
    "dtype": "float16",
    "image_token_index": 32000,
    "text_config": {"model_type": "llama", "vocab_size": 32064},
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "image_size": 336,
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
    },
}  # fmt: skip
"""The entries of LLaVA-1.5-7B's config.json that differ from the defaults."""


@pytest.fixture
def llava(tmp_path) -> Path:
    folder = tmp_path / "llava"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAVA))
    return folder


def predict(out: Path, *words: object) -> dict:
    cli.main(["predict", *map(str, words), "--out", str(out)])
    return json.loads((out / "result.json").read_text())


def test_a_configuration_is_enough(llava, tmp_path, capsys):
    out = tmp_path / "run"
    result = predict(out, "--backbone", llava, "--device-name", "A100-40", "--insert-layers", "4,8,12")
    assert (result["text_tokens"], result["multimodal_tokens"], result["dtype"]) == (64, 576, "float16")
    assert [row["insert_layer"] for row in result["layers"]] == [4, 8, 12]
    ratios = [row["kv_cache_ratio"] for row in result["layers"]]
    assert ratios == pytest.approx([0.8875, 0.775, 0.6625])
    assert result["stock"]["prefill"]["bound"] == "compute" and result["stock"]["decode"]["bound"] == "memory"
    assert result["stock"]["fits"] and result["encoder"] == "counted"
    assert (out / "predict.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "config.json").read_text())["command"] == "predict"
    printed = capsys.readouterr().out
    assert "fit in 40 GB" in printed and f"Run folder: {out}" in printed


def test_the_tiny_backbone_has_the_costs_of_its_model(tmp_path):
    result = predict(tmp_path, "--device-name", "H100", "--text-tokens", 16, "--insert-layers", "0,3")
    costs = CostModel.from_model(load_backbone("tiny", device="cpu").model)
    tokens = result["multimodal_tokens"]
    assert tokens == costs.encoder.tokens_per_tile
    flops = [row["prefill"]["flops"] for row in (result["stock"], *result["layers"])]
    assert flops == [costs.prefill_flops(16, tokens, layer, logits_to_keep=1) for layer in (0, 0, 3)]
    assert result["layers"][0]["prefill_ratio"] == 1


def test_a_described_device_and_this_machine(llava, tmp_path):
    numbers = ("--peak-tflops", 100, "--bandwidth-gb", 1000, "--memory-gb", 12)
    result = predict(tmp_path / "own", "--backbone", llava, "--device-name", "mine", *numbers)
    assert result["device"]["name"] == "mine" and not result["stock"]["fits"]
    measured = predict(tmp_path / "cpu", "--device-name", "cpu", "--efficiency", 1)
    assert measured["device"]["peak_flops"]["float32"] > 1e8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device-name", "H1000"], "'H1000' is not in the table"),
        (["--device-name", "T4", "--dtype", "bfloat16"], "T4 has no figure for bfloat16"),
        (["--device-name", "x", "--peak-tflops", "3"], "--bandwidth-gb None: a device of your own needs"),
        (["--device-name", "H100", "--efficiency", "2"], "--efficiency 2.0"),
        (["--device-name", "H100", "--multimodal-tokens", "0"], "--multimodal-tokens 0"),
        (["--device-name", "H100", "--insert-layers", "0-99"], "--insert-layers '0-99'"),
        (["--device-name", "H100", "--backbone", "/no/where"], "--backbone /no/where"),
        (["--device-name", "H100", "--backbone", "QWEN"], "--multimodal-tokens: images of this model differ"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_leave_no_folder(words, message, tmp_path, capsys):
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen" / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    words = [str(tmp_path / "qwen") if word == "QWEN" else word for word in words]
    with pytest.raises(SystemExit) as ended:
        cli.main(["predict", *words, "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
