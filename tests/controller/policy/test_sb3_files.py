"""A policy trained with Stable-Baselines3 alone: the same choices, and nothing in its zip is run."""

import base64
import contextlib
import io
import json
import os
import pickle
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, DQN, PPO

from deepinsert.controller.policy import sb3_files
from deepinsert.controller.policy.layer_policy import LayerPolicy
from deepinsert.controller.policy.sb3_files import read_network
from deepinsert.envs.insert_layer_env import InsertLayerEnv
from deepinsert.envs.observations import Normaliser
from deepinsert.envs.rewards.table import RewardTable

LAYERS = (0, 2, 5)
WIDTH = 6
ALGORITHMS = {"ppo": PPO, "a2c": A2C, "dqn": DQN}


@pytest.fixture(scope="module")
def data():
    """Table, observations and normaliser of 40 prompts."""
    rng = np.random.default_rng(0)
    observations = rng.normal(3.0, 2.0, size=(40, WIDTH))
    losses = rng.gamma(2.0, 0.4, size=(40, len(LAYERS)))
    flops = 100.0 - 10.0 * np.array(LAYERS) + np.zeros((40, 1))
    table = RewardTable.from_losses(losses, LAYERS, 6, flops=flops)
    return table, observations, Normaliser.fit(observations)


def make(data, name="ppo", skip_weight=0.5, **policy):
    """An untrained model on the project's environment; its random weights choose different layers."""
    table, observations, normaliser = data
    env = InsertLayerEnv(table=table, observations=normaliser(observations), skip_weight=skip_weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ALGORITHMS[name]("MlpPolicy", env, device="cpu", seed=1, policy_kwargs=policy or None)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return model


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("sb3") / "model.zip"
    make(data).save(path)
    return path


def from_sb3(model, data, backbone, **arguments):
    table, _, normaliser = data
    arguments = {"skip_weights": 0.5, **arguments}
    return LayerPolicy.from_sb3(model, table=table, normaliser=normaliser, backbone=backbone, **arguments)


@pytest.mark.parametrize("source", ["model", "zip"])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("ppo", {}),
        ("ppo", {"activation_fn": torch.nn.ReLU, "net_arch": [16]}),
        ("ppo", {"net_arch": []}),
        ("ppo", {"net_arch": {"pi": [8, 4], "vf": [16, 16, 16]}}),
        ("a2c", {}),
        ("dqn", {}),
        ("dqn", {"activation_fn": torch.nn.Tanh, "net_arch": [32]}),
    ],
)
def test_chooses_as_the_model_does(source, name, kwargs, data, tiny_backbone, tmp_path):
    model = make(data, name, **kwargs)
    model.save(tmp_path / "model.zip")
    source_model = model if source == "model" else tmp_path / "model.zip"
    policy = from_sb3(source_model, data, tiny_backbone, temperature=0.5)
    many = np.random.default_rng(1).normal(3.0, 4.0, size=(300, WIDTH))
    observations = torch.from_numpy(policy.normaliser(many))
    expected = model.predict(observations.numpy(), deterministic=True)[0]
    assert policy.columns(many).tolist() == expected.tolist() and len(set(expected)) > 1
    with torch.no_grad():
        if name == "dqn":
            probabilities = torch.softmax(model.policy.q_net(observations) / 0.5, dim=1)
        else:
            probabilities = model.policy.get_distribution(observations).distribution.probs
    np.testing.assert_allclose(policy.probabilities(many), probabilities, atol=2e-6, rtol=0)
    policy.save(tmp_path)
    assert (LayerPolicy.load(tmp_path).columns(many) == expected).all()


def test_a_policy_over_a_range_can_be_asked_for_a_budget(data, tiny_backbone):
    _table, observations, normaliser = data
    model = make(data, skip_weight=(0.1, 1.0))
    policy = from_sb3(model, data, tiny_backbone, skip_weights=(0.1, 1.0), observations=observations)
    assert policy.algorithm == "sb3" and policy.skip_weight == 1.0
    assert policy.training.prompts == 40 and len(policy.training.frontier) == 13
    weights = np.linspace(0.1, 1.0, 40)
    inputs = np.concatenate([normaliser(observations), policy.skip_weights.features_of(weights)], axis=1)
    expected = model.predict(inputs, deterministic=True)[0]
    assert (policy.columns(observations, weights) == expected).all()
    assert policy.resolve_skip_weight(flops_ratio=1.0) == 0.1
    with pytest.raises(ValueError, match=r"takes 6 numbers to 3 actions.*22 and 3"):
        from_sb3(make(data), data, tiny_backbone, skip_weights=(0.1, 1.0))


def test_another_network_than_an_mlp_is_refused(data, tiny_backbone, tmp_path):
    class Own(torch.nn.Module):
        features_dim = 4

        def __init__(self, space):
            super().__init__()
            self.linear = torch.nn.Linear(WIDTH, 4)

        def forward(self, observations):
            return self.linear(observations)

    model = make(data, features_extractor_class=Own)
    model.save(tmp_path / "model.zip")
    for source_model in (model, tmp_path / "model.zip"):
        with pytest.raises(ValueError, match=r"Own|features.extractor"):
            from_sb3(source_model, data, tiny_backbone)
    model = make(data, activation_fn=torch.nn.ELU)
    model.save(tmp_path / "model.zip")
    for source_model in (model, tmp_path / "model.zip"):
        with pytest.raises(ValueError, match=r"ELU.*ReLU"):
            from_sb3(source_model, data, tiny_backbone)


class Payload:
    """Makes a folder when a pickle of it is loaded."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def rewritten(path, target, name, content, compression=zipfile.ZIP_STORED):
    """A copy of the zip in `path` whose file `name` holds `content`."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w", compression) as archive:
        for info in source.infolist():
            if info.filename != name:
                archive.writestr(info.filename, source.read(info.filename))
        archive.writestr(name, content)
    return target


def member(path, name):
    with zipfile.ZipFile(path) as archive:
        return archive.read(name)


SERIALISED = (
    "policy_class",
    "policy_kwargs",
    "observation_space",
    "action_space",
    "rollout_buffer_class",
    "clip_range",
    "lr_schedule",
)


def with_payload_in_data(saved, tmp_path, entry):
    """The zip whose `data` holds a payload in one serialised entry."""
    content = json.loads(member(saved, "data"))
    pickled = pickle.dumps(Payload(tmp_path / "owned"))
    if not isinstance(content[entry], dict) or ":serialized:" not in content[entry]:
        content[entry] = {":type:": "<class 'dict'>"}
    content[entry][":serialized:"] = base64.b64encode(pickled).decode()
    return rewritten(saved, tmp_path / "bad.zip", "data", json.dumps(content))


def test_every_serialised_entry_is_tried(saved):
    content = json.loads(member(saved, "data"))
    names = {name for name, value in content.items() if isinstance(value, dict) and ":serialized:" in value}
    assert names <= set(SERIALISED)


@pytest.mark.parametrize("entry", SERIALISED)
def test_data_runs_nothing_though_sb3_would_have(saved, tmp_path, entry):
    path = with_payload_in_data(saved, tmp_path, entry)
    network = read_network(path)
    assert not (tmp_path / "owned").exists()
    for (weight, bias), (other, offset) in zip(network.layers, read_network(saved).layers, strict=True):
        assert (weight == other).all() and (bias == offset).all()
    with contextlib.suppress(Exception):  # what comes of the payload's value is no policy
        PPO.load(path, device="cpu")
    assert (tmp_path / "owned").is_dir()


@pytest.mark.parametrize(
    "name",
    [
        "policy.optimizer.pth",
        "pytorch_variables.pth",
        "_stable_baselines3_version",
        "system_info.txt",
        "extra.pkl",
        "../escaped.pkl",
    ],
)
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_other_files_are_left_shut(saved, tmp_path, name, form):
    path = rewritten(saved, tmp_path / "bad.zip", name, payload_bytes(tmp_path, form))
    assert len(read_network(path).layers) == 3
    assert sorted(item.name for item in tmp_path.iterdir()) == ["bad.zip"]


def payload_bytes(tmp_path, form):
    payload = Payload(tmp_path / "owned")
    if form == "pickle":
        return pickle.dumps(payload)
    buffer = io.BytesIO()
    tensors = {"action_net.weight": torch.zeros(3, 4), "action_net.bias": payload}
    torch.save(tensors, buffer, _use_new_zipfile_serialization=form == "torch")
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["pickle", "torch", "legacy"])
def test_weights_run_nothing(saved, tmp_path, form):
    content = payload_bytes(tmp_path, form)
    path = rewritten(saved, tmp_path / "bad.zip", "policy.pth", content)
    with pytest.raises(ValueError, match=r"bad\.zip"):
        read_network(path)
    assert not (tmp_path / "owned").exists()
    if form == "pickle":
        pickle.loads(content)
    else:
        torch.load(io.BytesIO(content), weights_only=False)
    assert (tmp_path / "owned").is_dir()  # the payload works where something unpickles it


def saved_tensors(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def inner(change, compression=zipfile.ZIP_STORED):
    """A `policy.pth` of a good policy with the pickle inside it changed."""
    good = saved_tensors({"action_net.weight": torch.zeros(3, 4), "action_net.bias": torch.zeros(3)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as source, zipfile.ZipFile(buffer, "w", compression) as target:
        for info in source.infolist():
            content = source.read(info)
            target.writestr(info.filename, change(content) if info.filename.endswith("data.pkl") else content)
    return buffer.getvalue()


GOOD = {"action_net.weight": torch.zeros(3, 4), "action_net.bias": torch.zeros(3)}
HIDDEN = {"mlp_extractor.policy_net.0.weight": torch.zeros(5, 6)}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "not a zip"),
        (saved_tensors([torch.zeros(3)]), "dictionary"),
        (saved_tensors({}), "0 layers"),
        (saved_tensors({**GOOD, "log_std": torch.zeros(3)}), "log_std"),
        (saved_tensors({**GOOD, "features_extractor.cnn.0.weight": torch.zeros(3)}), "features_extractor"),
        (saved_tensors({"action_net.weight": torch.zeros(3, 4)}), "layer 0"),
        (saved_tensors({**GOOD, "action_net.bias": torch.zeros(4)}), "layer 0"),
        (
            saved_tensors({**GOOD, "action_net.bias": torch.zeros(3, dtype=torch.int32)}),
            "action_net.bias|Int",
        ),
        (saved_tensors({**GOOD, "action_net.bias": 3.0}), "action_net.bias"),
        (saved_tensors({**GOOD, "action_net.bias": torch.tensor([0, float("nan"), 0])}), "not finite"),
        (saved_tensors({**GOOD, **HIDDEN}), "layer 0"),
        (saved_tensors({**GOOD, **HIDDEN, "mlp_extractor.policy_net.0.bias": torch.zeros(5)}), "layer 1"),
        (saved_tensors({**GOOD, "action_net.weight": torch.zeros(1).expand(3, 2**40)}), "does not hold"),
        (saved_tensors({**GOOD, "action_net.weight": torch.zeros(3, 4).to_sparse()}), "sparse"),
        (inner(lambda content: content, zipfile.ZIP_DEFLATED), "compressed"),
        (inner(lambda content: b""), "broken"),
        (inner(lambda content: content[:-9]), "broken"),
        (inner(lambda content: b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."), "builtins bytearray"),
        (inner(lambda content: pickle.dumps(os.mkdir, protocol=4)), "STACK_GLOBAL"),
        (inner(lambda content: content.replace(b"K\x0ctq", b"K\x7ftq")), "cannot be read"),
    ],
)
def test_refuses_weights_that_are_none(saved, tmp_path, content, named):
    path = rewritten(saved, tmp_path / "bad.zip", "policy.pth", content)
    with pytest.raises(ValueError, match=rf"bad\.zip.*({named})"):
        read_network(path, activation="tanh")


@pytest.mark.parametrize("name", ["policy.pth", "data"])
def test_a_zip_bomb_is_not_unpacked(saved, tmp_path, monkeypatch, name):
    for limit in ("MAX_WEIGHTS_BYTES", "MAX_DATA_BYTES"):
        monkeypatch.setattr(sb3_files, limit, 2**20)
    path = rewritten(saved, tmp_path / "bomb.zip", name, b"\0" * 2**26, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**18
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"'{name}' unpacks to more than 1048576 bytes"):
        read_network(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"\x80\x04.", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "policy_kwargs"),
        (b'{"policy_kwargs": "relu"}', "policy_kwargs"),
        (b'{"policy_kwargs": {"activation_fn": "os.system"}}', "os.system"),
        (b'{"policy_kwargs": {"features_extractor_class": 1}}', "features extractor"),
    ],
)
def test_refuses_data_that_does_not_say_what_the_network_is(saved, tmp_path, content, named):
    path = rewritten(saved, tmp_path / "bad.zip", "data", content)
    with pytest.raises(ValueError, match=rf"bad\.zip.*{named}"):
        read_network(path)


def test_refuses_what_is_no_zip_of_sb3(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match="SB3's save"):
        read_network(tmp_path / "nowhere.zip")
    (tmp_path / "text.zip").write_text("PK")
    with pytest.raises(ValueError, match=r"text\.zip is not a zip of SB3"):
        read_network(tmp_path / "text.zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("data", "{}")
    with pytest.raises(ValueError, match=r"0 files named 'policy\.pth'"):
        read_network(tmp_path / "empty.zip")
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            archive.writestr("policy.pth", member(saved, "policy.pth"))
    with pytest.raises(ValueError, match=r"2 files named 'policy\.pth'"):
        read_network(tmp_path / "twice.zip")
