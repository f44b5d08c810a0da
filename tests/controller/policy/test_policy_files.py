"""A policy on disk: it survives saving, and damaged or malicious files are refused without running code."""

import dataclasses
import hashlib
import json
import os
import pickle
import struct

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from deepinsert.controller.learning.train_policy import train_policy
from deepinsert.controller.policy.layer_policy import LayerPolicy

WIDTH = 12
HUGE = 2**62
POINT = {"skip_weight": 0.1, "loss": 0.3, "loss_increase": 0.01, "flops_ratio": 0.9, "reward": -0.2}


@pytest.fixture
def saved_folder(random_policy, tmp_path):
    random_policy.save(tmp_path)
    return tmp_path


def rewrite(folder, change):
    """Apply `change` to the description in `folder`; it may return another one."""
    path = folder / "policy.json"
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed))


def rewrite_weights(folder, data):
    """Put `data` in place of the weights, with the description's checksum to match."""
    (folder / "policy.safetensors").write_bytes(data)
    rewrite(folder, lambda content: content.update(weights_sha256=hashlib.sha256(data).hexdigest()))


@pytest.mark.parametrize("kind", ["random_policy", "ranged_policy"])
def test_survives_saving(kind, random_table, tmp_path, request):
    policy = request.getfixturevalue(kind)
    policy.save(tmp_path)
    loaded = LayerPolicy.load(tmp_path)
    observations = random_table[1]
    assert (loaded.probabilities(observations) == policy.probabilities(observations)).all()
    tensors = ("network", "normaliser", "backbone")
    for field in dataclasses.fields(LayerPolicy):
        if field.name not in tensors:
            assert getattr(loaded, field.name) == getattr(policy, field.name), field.name
    assert (loaded.backbone_name, loaded.backbone_fingerprint) == ("tiny", "0123456789abcdef")


def test_says_where_files_are_missing(saved_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"policy\.json does not exist"):
        LayerPolicy.load(tmp_path / "nowhere")
    (saved_folder / "policy.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"policy\.safetensors does not exist"):
        LayerPolicy.load(saved_folder)


def set_field(name, value):
    """A change of one field; dots lead into nested objects."""

    def change(content):
        *outer, last = name.split(".")
        for key in outer:
            content = content[key]
        content[last] = value

    return pytest.param(change, name, id=f"{name}={str(value)[:20]}")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        set_field("format", 1),
        set_field("format", 3),
        set_field("format", True),
        set_field("num_layers", 0),
        set_field("num_layers", 6.0),
        set_field("num_layers", HUGE),
        set_field("insert_layers", []),
        set_field("insert_layers", [0, 5, 2]),
        set_field("insert_layers", [0, 2, 2]),
        set_field("insert_layers", [0, 2, 7]),
        set_field("insert_layers", [-1, 2, 5]),
        set_field("insert_layers", "0-5"),
        set_field("skip_weight", -0.1),
        set_field("skip_weight", "0.5"),
        set_field("skip_weight", None),
        set_field("skip_weight", 10**400),
        set_field("skip_weight", 0.05),
        set_field("skip_weight", 1.5),
        set_field("skip_weights", [0.1, 1]),
        set_field("skip_weights.low", -0.1),
        set_field("skip_weights.low", True),
        set_field("skip_weights.high", 0.05),
        set_field("skip_weights.high", 1e12),
        set_field("skip_weights.step", 0.1),
        set_field("algorithm", "sac"),
        set_field("algorithm", None),
        set_field("observation", "embeddings"),
        set_field("observation.text_layer", -1),
        set_field("observation.text_layer", HUGE),
        set_field("observation.text_layer", True),
        set_field("observation.image", 1),
        set_field("observation.image", "true"),
        set_field("observation.audio", False),
        set_field("table_digest", ""),
        set_field("table_digest", "0011"),
        set_field("table_digest", "g" * 16),
        set_field("table_digest", 1122334455667788),
        set_field("bonus", "money"),
        set_field("bonus", ["depth"]),
        set_field("backbone", "tiny"),
        set_field("backbone.name", ""),
        set_field("backbone.name", "ti\0ny"),
        set_field("backbone.name", "a" * 5000),
        set_field("backbone.fingerprint", 12),
        set_field("network.observation", 0),
        set_field("network.observation", HUGE),
        set_field("network.hidden", [64] * 1000),
        set_field("network.hidden", [HUGE, HUGE]),
        set_field("network.hidden", [64, -64]),
        set_field("network.activation", "__import__('os').system"),
        set_field("training.prompts", 0),
        set_field("training.loss", [0.1, 0.2]),
        set_field("training.loss", [0.1, 0.2, "0.3"]),
        set_field("training.flops_ratio", [1, 1, -1]),
        set_field("training.best_fixed", 1),
        set_field("training.advantage", [0.1]),
        set_field("training.times", [1.0, 0.9]),
        set_field("training.times", [1.0, 0.9, -0.1]),
        set_field("training.times", 1.0),
        set_field("training.frontier", None),
        set_field("training.frontier", {"0": 1}),
        set_field("training.frontier", [1]),
        set_field("training.frontier", [{}] * 1001),
        *(
            set_field("training.frontier", [{**POINT, **changed}])
            for changed in (
                {"skip_weight": 0.05},
                {"skip_weight": 2.0},
                {"loss": -1.0},
                {"loss": None},
                {"loss_increase": "0"},
                {"flops_ratio": -0.5},
                {"reward": None},
                {"reward": 10**400},
                {"regret": 0.1},
            )
        ),
        set_field("training.surprise", 1),
        set_field("seed", "0"),
        set_field("versions", ["torch"]),
        set_field("versions", {"torch": 2}),
        set_field("versions", {str(index): "1" for index in range(1000)}),
        set_field("weights_sha256", ""),
        set_field("__class__", "os.system"),
    ],
)
def test_refuses_a_description_with_a_bad_field(ranged_policy, tmp_path, change, field):
    ranged_policy.save(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match="policy.json.*" + field.split(".")[-1]):
        LayerPolicy.load(tmp_path)


def test_an_earlier_format_is_refused_with_what_to_do(saved_folder):
    rewrite(saved_folder, lambda content: content.update(format=1))
    with pytest.raises(ValueError, match=r"'format' is 1.*earlier version.*train the policy again"):
        LayerPolicy.load(saved_folder)


@pytest.mark.parametrize(
    "name",
    [
        "format",
        "insert_layers",
        "skip_weights",
        "skip_weight",
        "bonus",
        "algorithm",
        "observation",
        "backbone",
        "table_digest",
        "network",
        "training",
        "seed",
        "versions",
        "weights_sha256",
    ],
)
def test_refuses_a_description_without_a_field(saved_folder, name):
    rewrite(saved_folder, lambda content: content.pop(name) and None)
    with pytest.raises(ValueError, match=f"policy.json: field '{name}' is missing"):
        LayerPolicy.load(saved_folder)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b"3",
        b'{"format": 1',
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"format": ' + b"9" * 10_000 + b"}",
        b'{"format": NaN}',
        b'{"format": 2, "format": 2}',
        b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
        b" " * (5 * 2**20),
    ],
    ids=lambda text: repr(text[:16]),
)
def test_refuses_a_description_that_is_none(saved_folder, text):
    (saved_folder / "policy.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"policy\.json"):
        LayerPolicy.load(saved_folder)


def with_tensor(name, value):
    """The saved weights with one tensor replaced, added, or (None) left out."""

    def change(data):
        tensors = {key: array for key, array in safetensors.numpy.load(data).items() if key != name}
        return safetensors.numpy.save(tensors if value is None else {**tensors, name: value})

    return change


def with_header(header, payload=b""):
    return lambda _: struct.pack("<Q", len(header)) + header + payload


NAN = np.zeros((64,), np.float32)
NAN[3] = np.nan


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: struct.pack("<Q", 2**63) + data[8:],
        with_header(b"{}"),
        with_header(b"not json"),
        with_header(
            b'{"network.0.weight":{"dtype":"F32","shape":[4611686018427387904,12],"data_offsets":[0,0]}}'
        ),
        with_header(
            b'{"network.0.weight":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]}}'
        ),
        with_tensor("network.0.bias", None),
        with_tensor("network.0.bias", np.zeros(63, np.float32)),
        with_tensor("network.0.bias", np.zeros((64, 1), np.float32)),
        with_tensor("network.0.bias", np.zeros(64, np.float64)),
        with_tensor("network.0.bias", np.zeros(64, np.int32)),
        with_tensor("network.0.bias", NAN),
        with_tensor("network.2.bias", np.full(3, -np.inf, np.float32)),
        with_tensor("normaliser.std", np.zeros(WIDTH, np.float32)),
        with_tensor("normaliser.std", np.full(WIDTH, -1, np.float32)),
        with_tensor("network.3.weight", np.zeros((3, 3), np.float32)),
    ],
)
def test_refuses_weights_that_are_not_those_described(saved_folder, change):
    rewrite_weights(saved_folder, change((saved_folder / "policy.safetensors").read_bytes()))
    with pytest.raises(ValueError, match=r"policy\.safetensors"):
        LayerPolicy.load(saved_folder)


def test_refuses_weights_of_another_policy(saved_folder, random_table, tmp_path):
    train_policy(*random_table, steps=1, seed=2).save(tmp_path / "other")
    (saved_folder / "policy.safetensors").write_bytes(
        (tmp_path / "other" / "policy.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match="weights_sha256"):
        LayerPolicy.load(saved_folder)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bytes_load_as_a_policy_or_raise(random_policy, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    random_policy.save(folder)
    path = folder / data.draw(st.sampled_from(["policy.json", "policy.safetensors"]))
    content = bytearray(path.read_bytes())
    # The beginning is where structure is: header lengths, field names, shapes.
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 1500) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(len(content) - 20, len(content)))])
    if path.name == "policy.json":
        path.write_bytes(content)
    else:
        rewrite_weights(folder, content)
    try:
        loaded = LayerPolicy.load(folder)
    except ValueError:
        return
    probabilities = loaded.probabilities(np.zeros((2, WIDTH)))
    assert probabilities.shape[0] == 2 and np.isfinite(probabilities).all()


class Payload:
    """Makes a folder when a pickle of it is loaded."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_loading_runs_nothing_from_the_files(random_policy, tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "control")))
    assert (tmp_path / "control").is_dir()  # the payload works where something unpickles it
    payload = pickle.dumps(Payload(tmp_path / "owned"))
    text = f"__import__('os').mkdir({str(tmp_path / 'owned')!r})"
    random_policy.save(tmp_path)
    description = json.loads((tmp_path / "policy.json").read_text())
    for name in description:
        random_policy.save(tmp_path)
        rewrite(tmp_path, lambda content, name=name: content.update({name: text}))
        with pytest.raises(ValueError, match=name):
            LayerPolicy.load(tmp_path)
    random_policy.save(tmp_path)
    rewrite_weights(tmp_path, payload)
    with pytest.raises(ValueError, match="not a safetensors file"):
        LayerPolicy.load(tmp_path)
    (tmp_path / "policy.json").write_bytes(payload)
    with pytest.raises(ValueError, match="not a policy description"):
        LayerPolicy.load(tmp_path)
    assert not (tmp_path / "owned").exists()
