"""A policy on disk: the same as SB3's, safe to load from anywhere, and refused where it does not belong."""

import dataclasses
import hashlib
import json
import os
import pickle
import struct

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deepinsert.controller.learning.algorithms import ppo
from deepinsert.controller.learning.train_policy import train_policy
from deepinsert.controller.policy.layer_policy import LayerPolicy
from deepinsert.controller.policy.outcomes import FrontierPoint
from deepinsert.controller.statistics import Interval
from deepinsert.envs.observations import Observation
from deepinsert.envs.rewards.table import RewardTable
from deepinsert.envs.skip_weights import SkipWeights

WIDTH = 12
LAYERS = (0, 2, 5)
HUGE = 2**62


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    losses = rng.gamma(2.0, 0.4, size=(64, len(LAYERS)))
    flops = 100.0 - 10.0 * np.array(LAYERS) + np.zeros((64, 1))
    return RewardTable.from_losses(losses, LAYERS, 6, flops=flops), rng.normal(3.0, 2.0, size=(64, WIDTH))


@pytest.fixture(scope="module")
def policy(table):
    return train_policy(*table, steps=2048, seed=1, backbone=("tiny", "0123456789abcdef"))


POINTS = (
    FrontierPoint(0.1, 0.3, 0.01, 0.9, -0.2),
    FrontierPoint(1.0, 0.4, None, None, 0.1),
)


@pytest.fixture(scope="module")
def ranged(policy):
    """The policy made one for a range, its network taking λ as well, with every optional field filled."""
    (weight, bias), *others = policy.network
    skip_weights = SkipWeights(0.1, 1.0)
    width = skip_weights.features_of([0.1]).shape[1]
    generator = torch.Generator().manual_seed(0)
    extra = torch.randn(len(bias), width, generator=generator)
    return dataclasses.replace(
        policy,
        skip_weights=skip_weights,
        bonus="time",
        algorithm="full-info",
        observation=Observation(3, True),
        network=((torch.cat([weight, extra], dim=1), bias), *others),
        table_digest="00112233aabbccdd",
        activation="relu",
        training=dataclasses.replace(
            policy.training, advantage=Interval(0.1, 0.0, 0.2), times=(1.0, 0.9, 0.7), frontier=POINTS
        ),
    )


@pytest.fixture
def saved(policy, tmp_path):
    policy.save(tmp_path)
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


def test_probabilities_and_actions_are_those_of_sb3(table, tmp_path, monkeypatch):
    rewards, observations = table
    models = []
    monkeypatch.setattr(
        "deepinsert.controller.learning.algorithms.ppo", lambda *args: models.append(ppo(*args)) or models[-1]
    )
    train_policy(rewards, observations, steps=4096).save(tmp_path)
    loaded = LayerPolicy.load(tmp_path)
    many = np.random.default_rng(1).normal(3.0, 4.0, size=(500, WIDTH))
    seen = loaded.normaliser(many)
    with torch.no_grad():
        wanted = models[0].policy.get_distribution(torch.from_numpy(seen)).distribution.probs.numpy()
    np.testing.assert_allclose(loaded.probabilities(many), wanted, atol=1e-6, rtol=0)
    actions = models[0].predict(seen, deterministic=True)[0]
    assert loaded.act(many).tolist() == np.array(LAYERS)[actions].tolist()
    assert len(set(actions)) > 1


@pytest.mark.parametrize("kind", ["policy", "ranged"])
def test_survives_saving(kind, table, tmp_path, request):
    policy = request.getfixturevalue(kind)
    policy.save(tmp_path)
    loaded = LayerPolicy.load(tmp_path)
    observations = table[1]
    assert (loaded.probabilities(observations) == policy.probabilities(observations)).all()
    tensors = ("network", "normaliser", "backbone")
    for field in dataclasses.fields(LayerPolicy):
        if field.name not in tensors:
            assert getattr(loaded, field.name) == getattr(policy, field.name), field.name
    assert (loaded.backbone_name, loaded.backbone_fingerprint) == ("tiny", "0123456789abcdef")


def test_skip_weight_is_what_the_network_sees_beside_the_observation(ranged, table):
    observations = table[1]
    weights = np.random.default_rng(3).uniform(0.1, 1.0, len(observations))
    inputs = np.concatenate(
        [ranged.normaliser(observations), ranged.skip_weights.features_of(weights)], axis=1
    )
    hidden = torch.from_numpy(inputs)
    for weight, bias in ranged.network[:-1]:
        hidden = torch.relu(hidden @ weight.T + bias)
    weight, bias = ranged.network[-1]
    wanted = torch.softmax(hidden @ weight.T + bias, dim=1)
    np.testing.assert_allclose(ranged.probabilities(observations, weights), wanted, atol=1e-6, rtol=0)
    assert ranged.columns(observations, weights).tolist() == wanted.argmax(dim=1).tolist()
    layers = np.array(LAYERS)[ranged.columns(observations, weights)]
    assert ranged.act(observations, weights).tolist() == layers.tolist()
    one = ranged.probabilities(observations, 0.3)
    assert (one == ranged.probabilities(observations, np.full(len(observations), 0.3))).all()
    assert not np.allclose(one, ranged.probabilities(observations, 0.9))
    default = ranged.probabilities(observations)
    assert (default == ranged.probabilities(observations, ranged.skip_weight)).all()


@pytest.mark.parametrize("weight", [0.05, 1.1, float("nan"), [0.5, 2.0]])
def test_refuses_a_skip_weight_it_was_not_trained_for(ranged, weight):
    with pytest.raises(ValueError, match=r"skip_weight.*0\.1 to 1"):
        ranged.probabilities(np.zeros((2, WIDTH)), weight)


def test_one_skip_weight_is_all_that_a_policy_for_one_knows(policy):
    with pytest.raises(ValueError, match=r"skip_weight 0\.7.*0\.5"):
        policy.probabilities(np.zeros((2, WIDTH)), 0.7)
    with pytest.raises(ValueError, match="one for each prompt"):
        policy.probabilities(np.zeros((2, WIDTH)), [0.5, 0.5, 0.5])


def test_probabilities_do_not_depend_on_the_other_prompts(policy, table):
    observations = table[1]
    alone = np.concatenate([policy.probabilities(row[None]) for row in observations])
    np.testing.assert_allclose(alone, policy.probabilities(observations), atol=1e-6, rtol=0)
    np.testing.assert_allclose(alone.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("bonus", ["depth", "flops"])
def test_mean_rewards_are_those_of_the_training_table(table, bonus):
    rewards, observations = table
    policy = train_policy(rewards, observations, skip_weight=0.7, bonus=bonus, steps=1)
    np.testing.assert_allclose(policy.mean_rewards(), rewards.rewards(0.7, bonus).mean(axis=0))
    assert policy.training.best_fixed == LAYERS[policy.mean_rewards().argmax()]


@pytest.mark.parametrize(
    "observations",
    [np.zeros(WIDTH), np.zeros((2, WIDTH + 1)), np.full((1, WIDTH), np.nan), np.full((1, WIDTH), np.inf)],
)
def test_refuses_observations_it_was_not_made_for(policy, observations):
    with pytest.raises(ValueError, match="observations"):
        policy.probabilities(observations)


def test_says_where_files_are_missing(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"policy\.json does not exist"):
        LayerPolicy.load(tmp_path / "nowhere")
    (saved / "policy.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"policy\.safetensors does not exist"):
        LayerPolicy.load(saved)


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
            set_field("training.frontier", [dict(dataclasses.asdict(POINTS[0]), **changed)])
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
def test_refuses_a_description_with_a_bad_field(ranged, tmp_path, change, field):
    ranged.save(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match="policy.json.*" + field.split(".")[-1]):
        LayerPolicy.load(tmp_path)


def test_an_earlier_format_is_refused_with_what_to_do(saved):
    rewrite(saved, lambda content: content.update(format=1))
    with pytest.raises(ValueError, match=r"'format' is 1.*earlier version.*train the policy again"):
        LayerPolicy.load(saved)


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
def test_refuses_a_description_without_a_field(saved, name):
    rewrite(saved, lambda content: content.pop(name) and None)
    with pytest.raises(ValueError, match=f"policy.json: field '{name}' is missing"):
        LayerPolicy.load(saved)


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
def test_refuses_a_description_that_is_none(saved, text):
    (saved / "policy.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"policy\.json"):
        LayerPolicy.load(saved)


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
def test_refuses_weights_that_are_not_those_described(saved, change):
    rewrite_weights(saved, change((saved / "policy.safetensors").read_bytes()))
    with pytest.raises(ValueError, match=r"policy\.safetensors"):
        LayerPolicy.load(saved)


def test_refuses_weights_of_another_policy(saved, table, tmp_path):
    train_policy(*table, steps=1, seed=2).save(tmp_path / "other")
    (saved / "policy.safetensors").write_bytes((tmp_path / "other" / "policy.safetensors").read_bytes())
    with pytest.raises(ValueError, match="weights_sha256"):
        LayerPolicy.load(saved)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bytes_load_as_a_policy_or_raise(policy, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    policy.save(folder)
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


def test_loading_runs_nothing_from_the_files(policy, tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "control")))
    assert (tmp_path / "control").is_dir()  # the payload works where something unpickles it
    payload = pickle.dumps(Payload(tmp_path / "owned"))
    text = f"__import__('os').mkdir({str(tmp_path / 'owned')!r})"
    policy.save(tmp_path)
    description = json.loads((tmp_path / "policy.json").read_text())
    for name in description:
        policy.save(tmp_path)
        rewrite(tmp_path, lambda content, name=name: content.update({name: text}))
        with pytest.raises(ValueError, match=name):
            LayerPolicy.load(tmp_path)
    policy.save(tmp_path)
    rewrite_weights(tmp_path, payload)
    with pytest.raises(ValueError, match="not a safetensors file"):
        LayerPolicy.load(tmp_path)
    (tmp_path / "policy.json").write_bytes(payload)
    with pytest.raises(ValueError, match="not a policy description"):
        LayerPolicy.load(tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.fixture(scope="module")
def tiny_policy(tiny_backbone):
    rng = np.random.default_rng(2)
    width = tiny_backbone.model.get_input_embeddings().weight.shape[1]
    losses = rng.gamma(2.0, 0.4, size=(32, 3))
    table = RewardTable.from_losses(losses, (0, 1, 3), tiny_backbone.num_layers)
    return train_policy(
        table, rng.normal(size=(32, width)), steps=1, backbone=("tiny", tiny_backbone.fingerprint)
    )


def test_recommends_by_loading_its_own_backbone(tiny_policy, tiny_backbone, tmp_path):
    tiny_policy.save(tmp_path)
    picture = Image.new("RGB", (32, 32), "red")
    picture.save(tmp_path / "bus.png")
    loaded = LayerPolicy.load(tmp_path)
    advice = loaded.recommend("What colour is the bus?", image=picture)
    assert loaded.backbone is None
    assert loaded.checked_backbone() is loaded.checked_backbone()  # it is loaded once
    assert advice.insert_layer in (0, 1, 3)
    assert advice.probability == max(advice.probabilities.values())
    assert sum(advice.probabilities.values()) == pytest.approx(1, abs=1e-6)
    column = (0, 1, 3).index(advice.insert_layer)
    assert advice.expected.loss == loaded.training.loss[column]
    assert advice.expected.depth == advice.insert_layer / tiny_backbone.num_layers
    assert (advice.expected.flops_ratio < 1) == (advice.insert_layer > 0)
    given = LayerPolicy.load(tmp_path, backbone=tiny_backbone)
    assert given.recommend("What colour is the bus?", image=tmp_path / "bus.png") == advice
    assert given.recommend("What colour is the bus?").expected.flops_ratio == 1  # nothing to insert


def test_refuses_another_backbone(tiny_policy, tiny_backbone, tmp_path):
    tiny_policy.save(tmp_path)
    rewrite(tmp_path, lambda content: content["backbone"].update(fingerprint="feedfeedfeedfeed"))
    loaded = LayerPolicy.load(tmp_path, backbone=tiny_backbone)
    with pytest.raises(ValueError, match="feedfeedfeedfeed.*" + tiny_backbone.fingerprint):
        loaded.recommend("What colour is the bus?")
