"""Finetuning leaves checkpoints and adapters that other tools load, with their insert layer and a card."""

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from deepinsert.backbones import load_backbone
from deepinsert.controller.evaluation.variants import Variant, check_precision, finetuned_variants
from deepinsert.controller.finetuning import finetune
from deepinsert.controller.finetuning.finetune import make_trainer
from deepinsert.controller.finetuning.model_card import (
    BEGIN,
    END,
    CardFacts,
    card_body,
    published_as,
    published_base,
    update_results,
)
from deepinsert.controller.finetuning.trainable_backbone import load
from deepinsert.controller.options import EvaluateOptions, FinetuneOptions
from deepinsert.controller.prompt_selection import read_data
from deepinsert.controller.runs.manifest import CheckpointError, check_complete
from deepinsert.envs.prompts import prompts_from


@pytest.fixture(scope="module")
def finished(small_run: FinetuneOptions, tmp_path_factory: pytest.TempPathFactory) -> FinetuneOptions:
    out = tmp_path_factory.mktemp("run") / "shapes"
    options = replace(small_run, out=out, sources="coco,textvqa", fraction=0.25, steps=2, save_every=100)
    finetune.run(options)
    return options


@pytest.fixture
def copy(finished: FinetuneOptions, tmp_path: Path) -> Path:
    return shutil.copytree(finished.out, tmp_path / "shapes")


def test_the_adapter_alone_loads_as_the_checkpoint_does(finished: FinetuneOptions) -> None:
    merged = load_backbone(finished.out / "checkpoint", device="cpu")
    adapted = load_backbone(finished.out / "adapter", device="cpu")
    assert adapted.insert_layer == merged.insert_layer == 3
    assert type(adapted.model) is type(merged.model) and not adapted.model.training
    expected = merged.model.state_dict()
    weights = adapted.model.state_dict()
    assert weights.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []
    assert load_backbone(finished.out / "adapter", insert_layer=1, device="cpu").insert_layer == 1


def test_an_adapter_without_our_facts_loads_on_its_base(copy: Path) -> None:
    (copy / "adapter" / "deepinsert.json").unlink()
    assert load_backbone(copy / "adapter", device="cpu").insert_layer == 0


def test_an_adapter_on_a_checkpoint_finds_it_from_anywhere(
    finished: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.out)
    second = replace(finished, backbone="checkpoint", steps=1, out=tmp_path / "second")
    finetune.run(second)
    monkeypatch.chdir(tmp_path)
    facts = json.loads((second.out / "adapter" / "deepinsert.json").read_text())
    assert facts == {"insert_layer": 3, "backbone": str(finished.out / "checkpoint")}
    assert load_backbone("second/adapter", device="cpu").insert_layer == 3
    card = (second.out / "adapter" / "README.md").read_text()
    assert 'load_backbone("BASE_MODEL", insert_layer=3)' in card  # no published model has these weights
    facts["backbone"] = str(tmp_path / "gone")
    (second.out / "adapter" / "deepinsert.json").write_text(json.dumps(facts))
    with pytest.raises(OSError, match=r"is an adapter of the model in .*gone, which is not there"):
        load_backbone("second/adapter", device="cpu")


def test_evaluation_refuses_a_damaged_checkpoint(copy: Path, finished: FinetuneOptions) -> None:
    options = EvaluateOptions(out=copy / "evaluate", data=finished.data, variants=(copy,), device="cpu")
    assert finetuned_variants(options, 1)[0].insert_layer == 3
    weights = copy / "checkpoint" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint is damaged: model\.safetensors is not what was"):
        finetuned_variants(options, 1)


def metadata(card: Path) -> dict[str, object]:
    return yaml.safe_load(card.read_text().split("---")[1])


def test_the_card_shows_data_recipe_and_layer(finished: FinetuneOptions) -> None:
    card = finished.out / "checkpoint" / "README.md"
    facts = metadata(card)
    assert facts["library_name"] == "transformers" and facts["pipeline_tag"] == "image-text-to-text"
    assert facts["datasets"] == ["instructions"] and "deepinsert" in facts["tags"]
    assert "base_model" not in facts  # the tiny backbone is not on the Hub
    assert metadata(finished.out / "adapter" / "README.md")["library_name"] == "peft"
    text = card.read_text()
    result = json.loads((finished.out / "result.json").read_text())
    for line in (
        "decoder layer 3 of 8",
        "arxiv.org/abs/2504.19327",
        "`instructions.json`",
        "| share of the file | 25 % |",
        "| `--lora-rank` | 4 |",
        "| `--seed` | 0 |",
        "| `--learning-rate` | 0.001 |",
        f"**{result['train_loss']:.4f}** nats",
        f"| torch | {torch.__version__} |",
    ):
        assert line in text, line
    assert re.search(r"sources \| coco \d+, textvqa \d+ \|", text)
    # Cards are published, so they contain no paths of this machine.
    assert str(finished.out.parent) not in text and str(finished.data.parent) not in text


@pytest.mark.parametrize("folder", ["checkpoint", "adapter"])
def test_the_code_of_the_card_runs_unchanged(
    copy: Path, folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(copy / folder)
    Image.new("RGB", (64, 64), "red").save("image.png")
    snippets = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet, {})
    assert capsys.readouterr().out.splitlines()[0] == "3"


def test_results_replace_results_and_nothing_else(copy: Path) -> None:
    card = copy / "checkpoint" / "README.md"
    card.write_text(card.read_text() + "\nA note of the author's.\n")
    before = card.read_text()
    table = "| source | accuracy |\n| --- | --- |\n| coco | 91.5 |"
    for accuracy in (0.5, 0.915):
        changed = update_results(copy, table, {"accuracy": accuracy, "loss": 0.25}, "easy VQA")
        assert changed == [card, copy / "adapter" / "README.md"]
    text = card.read_text()
    assert text.split(END)[1] == before.split(END)[1]
    assert text.split(BEGIN)[1].split(END)[0].strip() == table
    assert text.split(BEGIN)[0].split("---\n", 2)[2] == before.split(BEGIN)[0].split("---\n", 2)[2]
    results = ModelCard.load(card).data.eval_results
    metrics = {result.metric_type: result.metric_value for result in results}
    assert metrics == {"accuracy": 0.915, "loss": 0.25}
    assert {result.dataset_name for result in results} == {"easy VQA"}
    check_complete(copy / "checkpoint")
    card.write_text("a card of the author's own")
    assert update_results(copy / "checkpoint", table, {"accuracy": 1.0}) == []
    assert card.read_text() == "a card of the author's own"


def test_the_base_model_is_the_published_one(finished: FinetuneOptions, tmp_path: Path) -> None:
    assert published_base("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"
    assert published_base("tiny") is None
    assert published_base(str(finished.out / "checkpoint")) is None
    (tmp_path / "README.md").write_text("---\nbase_model: llava-hf/llava-1.5-7b-hf\n---\nStage one.\n")
    assert published_base(str(tmp_path)) == "llava-hf/llava-1.5-7b-hf"


def test_a_published_card_loads_from_the_hub() -> None:
    text = 'load_backbone(".")\nPeftModel.from_pretrained(base.model, ".")\nsplit(".")'
    assert published_as(text, "me/shapes", "adapter") == (
        'load_backbone("me/shapes", subfolder="adapter")\n'
        'PeftModel.from_pretrained(base.model, "me/shapes", subfolder="adapter")\nsplit(".")'
    )


def test_the_card_of_a_model_for_all_depths(finished: FinetuneOptions) -> None:
    options = replace(finished, insert_layer="random", layer_distribution="/home/me/runs/policy")
    facts = CardFacts(
        name="shapes",
        backbone="acme/llava",
        insert_layer="random",
        num_layers=8,
        data_name="train.json",
        data_sha256="0",
        sources={"coco": 3},
        options=asdict(options),
        result={"train_loss": 0.5, "steps": 2, "trainable_parameters": 1, "parameters": 2},
        versions={},
    )
    text = card_body(facts, adapter=True)
    assert "inserted at any decoder layer of 8" in text
    assert 'load_backbone("acme/llava", insert_layer=0)' in text
    assert "| policy |" in text and "/home/me" not in text


@pytest.mark.parametrize("method", ["lora", "full"])
def test_small_updates_survive_bfloat16(small_run: FinetuneOptions, tmp_path: Path, method: str) -> None:
    """Layers compute in bfloat16, but trained weights are float32, whose spacing is below a step of 2e-5."""
    run = replace(
        small_run, out=tmp_path / "run", method=method, dtype="bfloat16", learning_rate=2e-4, steps=3
    )
    trainer = make_trainer(load(run), prompts_from(read_data(run), per="record"), run)
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in trained} == {torch.float32}
    frozen = {weight.dtype for weight in trainer.model.parameters() if not weight.requires_grad}
    assert frozen == {torch.bfloat16 if method == "lora" else torch.float32}
    before = [weight.detach().clone() for weight in trained]
    trainer.train()
    changed_shares = [(old != new).float().mean().item() for old, new in zip(before, trained, strict=True)]
    assert (
        sorted(changed_shares)[len(changed_shares) // 10] > 0.9
    )  # embeddings of unseen tokens have no gradient
    finetune.run(run)
    saved = load_file(run.out / "checkpoint" / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}


def test_variants_of_several_precisions_are_not_compared() -> None:
    wide, narrow = (load_backbone("tiny", device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16"))
    check_precision([Variant.fixed("a", None, wide, 1), Variant.fixed("b", None, wide, 1)])
    with pytest.raises(ValueError, match=r"a is float32, b is bfloat16.*give one --dtype"):
        check_precision([Variant.fixed("a", None, wide, 1), Variant.fixed("b", None, narrow, 1)])
