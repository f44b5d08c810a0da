"""`--push-to-hub` pushes every byte of a variant to the Hub, and loses nothing if it fails."""

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from small_hub import CUT_OFF, Hub, small_hub

from deepinsert.controller.finetuning import finetune
from deepinsert.controller.finetuning.publish import PublishError, publish, repository_name
from deepinsert.controller.options import FinetuneOptions

ROOT = Path(__file__).parents[3]
# One process tries all tokens, because its imports take longer than the pushes.
TRY_TOKENS = """
import os, pickle, sys
from deepinsert.controller.finetuning.publish import PublishError, publish
options, tokens = pickle.load(sys.stdin.buffer)
for token in tokens:
    os.environ["HF_TOKEN"] = token
    try:
        print("pushed", publish(options))
    except PublishError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def finished(rendered_data: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneOptions:
    options = FinetuneOptions(
        out=tmp_path_factory.mktemp("run") / "my variant",
        data=rendered_data,
        insert_layer=3,
        fraction=0.12,
        steps=1,
        batch_size=2,
        lora_rank=4,
        device="cpu",
    )
    finetune.run(options)
    return options


@pytest.fixture
def hub() -> Iterator[Hub]:
    with small_hub() as server:
        yield server


def environment(hub: Hub, home: Path) -> dict[str, str]:
    others = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    # Large files go through LFS: the test's server does not speak the protocol of the newer store.
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return {**others, **settings, "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}


def push(options: FinetuneOptions, tokens: list[str], hub: Hub, home: Path) -> list[str]:
    """Return what `publish` returns or raises in a process that uses this hub, with each of the tokens."""
    process = subprocess.run(
        [sys.executable, "-c", TRY_TOKENS],
        input=pickle.dumps((options, tokens)),
        env=environment(hub, home),
        cwd=home,
        capture_output=True,
        check=True,
    )
    return process.stdout.decode().splitlines()


def test_every_byte_arrives(finished: FinetuneOptions, hub: Hub, tmp_path: Path) -> None:
    options = replace(finished, hub_model_id="me/shapes", hub_private_repo=True)
    assert push(options, ["hf_writer"], hub, tmp_path) == [f"pushed {hub.address}/me/shapes"]
    check_arrived(finished, hub)


@pytest.mark.slow
def test_the_command_pushes_a_finished_run(finished: FinetuneOptions, hub: Hub, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deepinsert.controller.cli", "finetune", "--out", str(finished.out)]
    for name in ("data", "insert_layer", "fraction", "steps", "batch_size", "lora_rank", "device"):
        command += [f"--{name.replace('_', '-')}", str(getattr(finished, name))]
    command += ["--push-to-hub", "--hub-model-id", "me/shapes", "--hub-private-repo"]
    variables = {**environment(hub, tmp_path), "HF_TOKEN": "hf_writer"}
    process = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert f"Published: {hub.address}/me/shapes" in process.stdout
    check_arrived(finished, hub)


def test_an_adapter_of_a_local_backbone_is_not_pushed(
    finished: FinetuneOptions, hub: Hub, tmp_path: Path
) -> None:
    options = replace(finished, hub_model_id="me/shapes", backbone=str(finished.out / "checkpoint"))
    assert push(options, ["hf_writer"], hub, tmp_path) == [f"pushed {hub.address}/me/shapes"]
    arrived = hub.files["me/shapes"]
    assert "model.safetensors" in arrived and not any(name.startswith("adapter") for name in arrived)


def check_arrived(finished: FinetuneOptions, hub: Hub) -> None:
    assert list(hub.files) == ["me/shapes"] and hub.private["me/shapes"]
    arrived = hub.files["me/shapes"]
    sent = {path.name: path for path in (finished.out / "checkpoint").iterdir()}
    sent |= {f"adapter/{path.name}": path for path in (finished.out / "adapter").iterdir()}
    assert arrived.keys() == sent.keys()
    assert "model.safetensors" in arrived and "adapter/deepinsert.json" in arrived
    assert not any("optimizer" in name or "rng_state" in name for name in arrived)
    for name, path in sent.items():
        if not name.endswith("README.md"):
            assert arrived[name] == path.read_bytes(), name
    card = arrived["README.md"].decode()
    assert 'load_backbone("me/shapes")' in card and '(".")' not in card
    assert 'load_backbone("me/shapes", subfolder="adapter")' in arrived["adapter/README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "image-text-to-text"
    assert hub.cards == [card]  # the Hub has validated it


def test_a_refused_push_is_explained_in_one_line(finished: FinetuneOptions, hub: Hub, tmp_path: Path) -> None:
    options = replace(finished, push_to_hub=True, hub_model_id="me/shapes")
    tokens = ["", "hf_wrong", "hf_reader", CUT_OFF, "hf_writer", "hf_writer"]
    none, wrong, reader, cut, pushed, again = push(options, tokens, hub, tmp_path)
    for line in (none, wrong, reader, cut):
        assert line.startswith("--push-to-hub: me/shapes could not be pushed: ")
        assert f"The variant is safe in {finished.out / 'checkpoint'}; the same command pushes it" in line
    assert "hf auth login" in none and "hf auth login" in wrong
    assert "no right to write" in reader
    assert f"{hub.address} cannot be reached" in cut
    assert pushed == again == f"pushed {hub.address}/me/shapes"
    assert not hub.private["me/shapes"]


def test_offline_mode_is_explained_in_one_line(finished: FinetuneOptions) -> None:
    with pytest.raises(PublishError, match=r"HF_HUB_OFFLINE is set: unset it.*is safe in .*checkpoint"):
        finetune.run(replace(finished, push_to_hub=True))


def test_the_repository_is_named_as_the_run_folder(finished: FinetuneOptions) -> None:
    assert repository_name(finished.out) == "my-variant"
    with pytest.raises(PublishError, match="my-variant could not be pushed"):
        publish(finished)
