"""Reward tables on disk: files are whole or absent, can be added, keep all bits, and run no code."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch

from deepinsert.backbones import load_backbone
from deepinsert.envs import RewardTable, load_instructions, prompts_from
from deepinsert.envs.rewards import files as reward_files
from deepinsert.envs.rewards import keys as prompt_keys
from deepinsert.envs.rewards.files import MANIFEST, RewardFiles
from deepinsert.envs.rewards.group_forward import GroupForward

LAYERS = (0, 3, 8)


@pytest.fixture(scope="module")
def prompts(rendered_data):
    """Nine prompts: eight about four images, and one without an image."""
    all_prompts = prompts_from(load_instructions(rendered_data))
    images = list(dict.fromkeys(prompt.image_key for prompt in all_prompts if prompt.images))[:4]
    with_image = [prompt for prompt in all_prompts if prompt.images and prompt.image_key in images]
    text = next(prompt for prompt in all_prompts if not prompt.images)
    return [*with_image[:5], text, *with_image[-3:]]


@pytest.fixture(scope="module")
def table(tiny_backbone, prompts):
    filled = RewardTable(tiny_backbone, prompts, LAYERS)
    filled.fill()
    return filled


def assert_same(table, expected):
    """Assert that two tables are equal to the last bit."""
    assert table.prompt_ids == expected.prompt_ids and table.insert_layers == expected.insert_layers
    for name in ("losses", "correct", "agreement", "greedy", "flops", "stock_flops"):
        np.testing.assert_array_equal(getattr(table, name), getattr(expected, name), err_msg=name)
    assert table.digest == expected.digest


@pytest.fixture
def no_forward(monkeypatch):
    """Let a test fail that computes losses."""
    monkeypatch.setattr(GroupForward, "run", None)


@pytest.fixture
def folder(table, tmp_path):
    """A folder that contains the whole table."""
    table.save(tmp_path / "table")
    return tmp_path / "table"


def shards(folder):
    return sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("_"))


def test_save_and_load(table, folder):
    loaded = RewardTable.load(folder)
    assert_same(loaded, table)
    for name in ("sources", "image_keys", "prompt_keys", "num_layers", "origin"):
        assert getattr(loaded, name) == getattr(table, name)
    np.testing.assert_array_equal(loaded.bonus("flops"), table.bonus("flops"))
    with pytest.raises(LookupError, match="no backbone"):
        RewardTable.load(folder, (0, 5)).loss(0, 1)


def test_a_table_of_losses_from_elsewhere_is_saved_too(tmp_path):
    table = RewardTable.from_losses([[1.0, np.nan], [0.5, 2.0]], (1, 2), 4, image_keys=["a", "a"])
    table.save(tmp_path)
    loaded = RewardTable.load(tmp_path)
    np.testing.assert_array_equal(loaded.losses, table.losses)
    assert not loaded.complete and loaded.digest == table.digest
    with pytest.raises(LookupError, match="FLOPs"):
        _ = loaded.flops


def test_other_programs_read_the_folder_as_one_data_set(table, folder):
    for rows in (pq.read_table(folder), pa.dataset.dataset(folder).to_table()):
        assert rows.num_rows == table.losses.size
        assert set(rows.column_names) == set(reward_files.SCHEMA.names)
        np.testing.assert_array_equal(rows["loss"].to_numpy(), table.losses.ravel())
        assert rows["prompt_id"].to_pylist() == [name for name in table.prompt_ids for _ in LAYERS]
        assert rows["correct"].null_count == table.losses.size
        np.testing.assert_array_equal(rows["agrees"].to_numpy(), table.agreement.ravel())


def test_losses_in_a_folder_are_not_computed_again(tiny_backbone, prompts, table, folder, no_forward):
    assert_same(RewardTable(tiny_backbone, prompts, LAYERS, folder=folder), table)
    order = np.random.default_rng(0).permutation(len(prompts))[:6]
    part = RewardTable(tiny_backbone, [prompts[index] for index in order], (3, 8), folder=folder)
    np.testing.assert_array_equal(part.losses, table.losses[order][:, 1:])
    np.testing.assert_array_equal(part.agreement, table.agreement[order][:, 1:])  # from layer 0
    renamed = [replace(prompt, id=f"n{prompt.id}", source="new") for prompt in prompts]
    np.testing.assert_array_equal(
        RewardTable(tiny_backbone, renamed, LAYERS, folder=folder).losses, table.losses
    )


def test_computed_losses_are_added(tiny_backbone, prompts, table, tmp_path):
    first = RewardTable(tiny_backbone, prompts, LAYERS, folder=tmp_path)
    first.loss(0, 1)
    assert not list(tmp_path.iterdir())
    first.flush()
    assert len(shards(tmp_path)) == 1
    first.flush()
    assert len(shards(tmp_path)) == 1  # nothing new
    first = RewardTable(tiny_backbone, prompts, LAYERS, folder=tmp_path, flush_seconds=0.0)
    first.subset([5, 6]).loss(0, 2)
    assert len(shards(tmp_path)) == 2
    again = RewardTable(tiny_backbone, prompts, LAYERS, folder=tmp_path)
    np.testing.assert_array_equal(again.losses, first.losses)
    assert 0 < (~np.isnan(again.losses)).sum() < again.losses.size
    again.fill()
    assert_same(again, table)
    assert_same(RewardTable.load(tmp_path), table)
    again.record_correct(0, 0, 1)
    again.flush()
    assert RewardTable.load(tmp_path).correct[0, 0] == 1


def test_layers_are_appended_bit_for_bit(tiny_backbone, prompts, table, tmp_path):
    for layers in ((8,), (0,), (3,)):
        RewardTable(tiny_backbone, prompts, layers, folder=tmp_path).fill()
    assert len(shards(tmp_path)) == 3
    assert_same(RewardTable.load(tmp_path), table)
    assert RewardTable.load(tmp_path, (3,)).losses.tolist() == table.losses[:, 1:2].tolist()


def test_prompts_are_appended_bit_for_bit(tiny_backbone, prompts, table, tmp_path):
    """If a group has grown, the losses of the larger group take precedence."""
    last = {prompts[-1].image_key}
    for chosen in (
        [prompt for prompt in prompts if prompt.image_key in last],
        [prompt for prompt in prompts if prompt.image_key not in last][1:],
        prompts,
    ):
        part = RewardTable(tiny_backbone, chosen, LAYERS, folder=tmp_path, same_group=True)
        part.fill()
    assert_same(part, table)
    assert_same(RewardTable.load(tmp_path), table)
    rows = [file.num_rows for file in map(pq.read_table, shards(tmp_path))]
    assert sum(rows) < 2 * table.losses.size  # groups that did not change were not computed again


def test_losses_of_another_group_serve_a_table_of_some_questions(tiny_backbone, prompts, table, folder):
    one = [prompts[1]]
    assert prompts[0].image_key == prompts[1].image_key
    part = RewardTable(tiny_backbone, one, LAYERS, folder=folder)
    assert part.group_keys[0] != table.group_keys[1]
    np.testing.assert_array_equal(part.losses, table.losses[1:2])
    separate = RewardTable(tiny_backbone, one, LAYERS, folder=folder, same_group=True)
    assert np.isnan(separate.losses).all()
    separate.fill()
    np.testing.assert_allclose(separate.losses, part.losses, atol=1e-5)


def test_another_batch_tokens_is_another_group(tiny_backbone, prompts, table):
    other = RewardTable(tiny_backbone, prompts, LAYERS, batch_tokens=4096)
    assert not set(other.group_keys) & set(table.group_keys) and other.prompt_keys == table.prompt_keys


def test_a_folder_of_another_backbone_is_refused(prompts, folder):
    other = load_backbone("tiny", device="cpu", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"another backbone or precision.*dtype 'float32', here 'bfloat16'"):
        RewardTable(other, prompts, LAYERS, folder=folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"\.parquet was computed with another backbone or precision"):
        RewardTable(other, prompts, LAYERS, folder=folder)


def test_missing_files_are_named(tiny_backbone, prompts, table, folder):
    missing = shards(folder)[0]
    missing.unlink()
    with pytest.raises(ValueError, match=f"{missing.name} is missing.*_manifest.json"):
        RewardTable.load(folder)
    again = RewardTable(tiny_backbone, prompts, LAYERS, folder=folder)
    assert np.isnan(again.losses).all()
    again.fill()
    assert_same(RewardTable.load(folder), table)


def test_unfinished_tables_are_not_complete(tiny_backbone, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_keys, "MIN_GROUP_PROMPTS", 2)
    with pytest.raises(ValueError, match="holds no reward table"):
        RewardTable.load(tmp_path / "nowhere")
    part = RewardTable(tiny_backbone, prompts, LAYERS, folder=tmp_path)
    part.folder.write_prompts()
    with pytest.raises(ValueError, match="no losses yet"):
        RewardTable.load(tmp_path)
    part.loss(0, 0)
    part.folder.write_shard(0, *np.nonzero(~np.isnan(part.losses)))
    loaded = RewardTable.load(tmp_path)
    assert len(loaded) == len(prompts) and not loaded.complete and loaded.insert_layers == (0,)


def assert_refused(folder, match):
    with pytest.raises(ValueError, match=match):
        RewardTable.load(folder)


def test_every_flipped_byte_is_noticed(folder):
    shard = shards(folder)[0]
    content = shard.read_bytes()
    for place in np.random.default_rng(0).integers(len(content), size=200):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(place % 8)
        shard.write_bytes(flipped)
        assert_refused(folder, f"{shard.name} is damaged.*remove it")


@pytest.mark.parametrize("end", [0, 1, 4, 100, -1])
def test_every_truncation_is_noticed(tiny_backbone, prompts, table, folder, end):
    shard = shards(folder)[0]
    shard.write_bytes(shard.read_bytes()[:end])
    assert_refused(folder, f"{shard.name} is damaged")
    with pytest.raises(ValueError, match=f"{shard.name} is damaged.*remove it"):
        RewardTable(tiny_backbone, prompts, LAYERS, folder=folder)
    shard.unlink()  # the remedy in the message
    RewardTable(tiny_backbone, prompts, LAYERS, folder=folder).fill()
    assert_same(RewardTable.load(folder), table)


def write_shard(folder: Path, content: bytes) -> Path:
    """Write a file whose name contains the right hash."""
    path = folder / f"added-{reward_files.hashlib.sha256(content).hexdigest()[:16]}.parquet"
    path.write_bytes(content)
    return path


def parquet(table: pa.Table) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    return buffer.getvalue().to_pybytes()


class Trap:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_code_in_a_file_is_run_and_no_bad_column_is_accepted(folder, tmp_path):
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    whole = pq.read_table(shards(folder)[0])
    layers = whole["insert_layer"]
    bad_contents = {
        "pickle": trap,
        "pandas metadata": parquet(pa.table({"a": [1]}).replace_schema_metadata({"PANDAS": trap})),
        "another format": parquet(pa.table({"loss": [1.0]})),
        "no origin": parquet(whole.replace_schema_metadata({})),
        "list as origin": parquet(whole.replace_schema_metadata({"deepinsert": "[1]"})),
        "pickle as origin": parquet(whole.replace_schema_metadata({"deepinsert": trap})),
        "bytes for losses": parquet(
            whole.set_column(6, "loss", pa.array([trap] * len(whole), type=pa.binary()))
        ),
        "text for layers": parquet(whole.set_column(5, "insert_layer", pa.array(["x"] * len(whole)))),
        "infinite": parquet(whole.set_column(6, "loss", pa.array([np.inf] * len(whole)))),
        "no losses": parquet(whole.set_column(6, "loss", pa.nulls(len(whole), pa.float64()))),
        "numbers for keys": parquet(whole.set_column(0, "prompt_key", layers)),
    }
    for content in bad_contents.values():
        path = write_shard(folder, content)
        with pytest.raises(ValueError, match=f"{path.name} is no shard.*remove it"):
            RewardTable.load(folder)
        path.unlink()
    assert not (tmp_path / "sprung").exists()
    RewardTable.load(folder)


def test_layers_that_the_backbone_lacks_change_nothing(tiny_backbone, prompts, table, folder):
    whole = pq.read_table(shards(folder)[0])
    layers = pa.array(np.resize([-1, 9, 2**31 - 1], len(whole)), type=pa.int32())
    write_shard(folder, parquet(whole.set_column(5, "insert_layer", layers)))
    assert_same(RewardTable(tiny_backbone, prompts, LAYERS, folder=folder), table)
    assert_refused(folder, "insert_layers")


@pytest.mark.parametrize("name", ["notes.txt", "part-0.parquet", "losses-00000-0123.parquet"])
def test_a_foreign_file_is_named(folder, name):
    (folder / name).write_text("mine")
    assert_refused(folder, f"{name} is no file of a reward table; remove it")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"origin": {}, "files": {"a": 3}}', "\x00"])
def test_a_damaged_manifest_is_named(table, folder, content):
    (folder / MANIFEST).write_text(content)
    assert_refused(folder, "_manifest.json is damaged.*remove it")
    (folder / MANIFEST).unlink()
    assert_same(RewardTable.load(folder), table)


def test_the_manifest_s_hash_is_checked(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    for entry in manifest["files"].values():
        entry["sha256"] = entry["sha256"][:-1] + ("0" if entry["sha256"][-1] != "0" else "1")
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert_refused(folder, "is damaged")


def test_every_writer_writes_the_same_manifest(table, folder, tmp_path):
    content = (folder / MANIFEST).read_bytes()
    RewardFiles(folder, table.origin).write_manifest()
    assert (folder / MANIFEST).read_bytes() == content
    table.save(tmp_path / "other")
    assert (tmp_path / "other" / MANIFEST).read_bytes() == content


def test_a_failed_write_leaves_nothing(tiny_backbone, prompts, table, folder, monkeypatch):
    before = sorted(os.listdir(folder))
    again = RewardTable(tiny_backbone, prompts, LAYERS, folder=folder)

    def fail(*_args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        again.folder.write_shard(0, *np.nonzero(table.losses > 1))
    assert sorted(os.listdir(folder)) == before


WRITER = """
import sys
import numpy as np
from deepinsert import RewardTable
from deepinsert.envs.rewards.cells import Cells
from deepinsert.envs.rewards.prompt_names import PromptNames
from deepinsert.envs.rewards.table_folder import TableFolder
rng = np.random.default_rng(0)
table = RewardTable.from_losses(np.zeros((1, 32)), range(32), 32)
names = PromptNames.of_losses(2000)
cells = Cells.of_losses(rng.random((2000, 32)), range(32), 32)
folder = TableFolder(sys.argv[1], names, cells, table.origin)
folder.write_prompts()
print("ready", flush=True)
number = 0
while True:
    rows, columns = np.repeat(np.arange(20) + number % 99 * 20, 32), np.tile(np.arange(32), 20)
    folder.write_shard(number, rows, columns)
    folder.write_manifest()
    number += 1
"""


def test_a_killed_writer_leaves_only_whole_files(tmp_path):
    for seed in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdout=subprocess.PIPE,
        )
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.2 + 0.1 * seed)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if shards(tmp_path):
            assert not RewardTable.load(tmp_path).complete
    assert shards(tmp_path)
    shutil.rmtree(tmp_path)
