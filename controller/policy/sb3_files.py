"""Reads the network of a policy that was trained with stable-baselines3 (SB3), without running code.

`PPO.load` unpickles entries of `data` inside the zip, which runs any code that its author put there. This
module reads the tensors of `policy.pth` without unpickling objects and within size limits, and the name of
the activation function, which `data` contains in plain JSON. It opens no other file of the zip.
"""

from __future__ import annotations

import io
import json
import pickletools
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from .policy_record import Activation, Network

MAX_ZIP_BYTES = 256 * 2**20
MAX_WEIGHTS_BYTES = 256 * 2**20
MAX_DATA_BYTES = 64 * 2**20
MAX_LAYERS = 16

WEIGHTS = "policy.pth"
DATA = "data"

PICKLED_NAMES = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch FloatStorage",
    "torch DoubleStorage",
}
"""All names that the pickle of a state dict of float tensors refers to."""
FOREIGN_OPCODES = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
"""Pickle opcodes that name or build objects and that torch.save never writes."""
ACTIVATIONS: dict[str, Activation] = {
    "<class 'torch.nn.modules.activation.Tanh'>": "tanh",
    "<class 'torch.nn.modules.activation.ReLU'>": "relu",
}
ACTOR = re.compile(r"mlp_extractor\.policy_net\.(\d+)\.(weight|bias)|(action_net)\.(weight|bias)")
ACTION_VALUES = re.compile(r"q_net\.q_net\.(\d+)\.(weight|bias)")
UNUSED = re.compile(r"(mlp_extractor\.value_net|value_net|q_net_target\.q_net)\.[\d.]*(weight|bias)")


@dataclass(frozen=True)
class SB3Network:
    """An MLP with `activation` between its linear `layers`.

    `action_values` is True if its outputs are the values of actions (DQN) and not logits.
    """

    layers: Network
    activation: Activation
    action_values: bool

    def logit_layers(self, temperature: float) -> Network:
        """Return the layers of a network to logits; action values are divided by `temperature`."""
        if not self.action_values:
            return self.layers
        weight, bias = self.layers[-1]
        return (*self.layers[:-1], (weight / temperature, bias / temperature))

    def check_shape(self, inputs: int, actions: int) -> None:
        """Raise `ValueError` unless the network maps `inputs` numbers to `actions` actions."""
        own_inputs, own_actions = self.layers[0][0].shape[1], self.layers[-1][0].shape[0]
        if (own_inputs, own_actions) != (inputs, actions):
            raise ValueError(
                f"this network takes {own_inputs} numbers to {own_actions} actions; the normaliser, the skip "
                f"weights and the table make {inputs} and {actions}: give those it was trained with"
            )


def read_network(path: str | Path, activation: Activation | None = None) -> SB3Network:
    """Read the network in a zip that `PPO.save`, `A2C.save` or `DQN.save` wrote, without running code.

    `activation` is by default the one that the zip names.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such zip, is larger than a layer policy can be, or contains another network
            than an MLP; the error names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the zip that SB3's save wrote")
    if path.stat().st_size > MAX_ZIP_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, more than a layer policy's {MAX_ZIP_BYTES}")
    try:
        with zipfile.ZipFile(path) as archive:
            weights = _member(archive, WEIGHTS, MAX_WEIGHTS_BYTES)
            data = None if activation else _member(archive, DATA, MAX_DATA_BYTES)
        tensors = _state_dict(weights)
        layers, action_values = _linear_layers(tensors)
        if data is not None:
            activation = _named_activation(data) or ("relu" if action_values else "tanh")
    except (ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a zip of SB3 with an MLP policy: {error}") from None
    return SB3Network(layers, cast(Activation, activation), action_values)


def network_of_model(model: Any, activation: Activation | None = None) -> SB3Network:
    """Return the network of a PPO, A2C or DQN model; see `read_network`."""
    from stable_baselines3.common.torch_layers import FlattenExtractor

    policy = model.policy
    extractor = getattr(policy, "features_extractor", None) or policy.q_net.features_extractor
    if not isinstance(extractor, FlattenExtractor):
        raise ValueError(f"{type(extractor).__name__} before the network: only a plain MLP can be converted")
    state = {name: value.detach().cpu().clone() for name, value in policy.state_dict().items()}
    layers, action_values = _linear_layers(state)
    function = f"<class '{policy.activation_fn.__module__}.{policy.activation_fn.__qualname__}'>"
    return SB3Network(layers, activation or _activation_of_class(function), action_values)


def _member(archive: zipfile.ZipFile, name: str, max_bytes: int) -> bytes:
    """Return the content of one file in the zip.

    No more than `max_bytes` are unpacked, since the size in a file's header may be wrong.
    """
    infos = [info for info in archive.infolist() if info.filename == name]
    if len(infos) != 1:
        raise ValueError(f"it holds {len(infos)} files named {name!r}, not 1")
    with archive.open(infos[0]) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{name!r} unpacks to more than {max_bytes} bytes")
    return content


def _state_dict(content: bytes) -> dict[str, torch.Tensor]:
    """Return the tensors of a `policy.pth`.

    Torch's restricted unpickler reads them, after a check of the names that the pickle refers to.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        infos = archive.infolist()
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise ValueError(f"{WEIGHTS!r} is compressed, which torch.save never does")
        if sum(info.file_size for info in infos) > len(content):
            raise ValueError(f"{WEIGHTS!r} claims to hold more bytes than it has")
        descriptions = [info for info in infos if info.filename.endswith("/data.pkl")]
        if len(descriptions) != 1:
            raise ValueError(f"{WEIGHTS!r} was not written by torch.save")
        _check_names(archive.read(descriptions[0]))
    try:
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can cause any exception
        raise ValueError(f"{WEIGHTS!r} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise ValueError(f"{WEIGHTS!r} is not a dictionary of tensors")
    return loaded


def _check_names(pickled: bytes) -> None:
    """Raise `ValueError` for a pickle that refers to anything that a dictionary of tensors does not need."""
    try:
        opcodes = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(pickled)]
    except Exception as error:  # a broken file can cause any exception
        raise ValueError(f"{WEIGHTS!r} is broken: {error}") from None
    for name, argument in opcodes:
        if name == "GLOBAL" and argument not in PICKLED_NAMES:
            raise ValueError(f"{WEIGHTS!r} refers to {argument!r}, which is no part of a network's tensors")
        if name in FOREIGN_OPCODES:
            raise ValueError(f"{WEIGHTS!r} was not written by torch.save: it holds the opcode {name}")


def _linear_layers(state: Mapping[str, Any]) -> tuple[Network, bool]:
    """Return the linear layers in order, and whether their outputs are action values and not logits."""
    action_values = any(ACTION_VALUES.fullmatch(name) for name in state)
    pattern = ACTION_VALUES if action_values else ACTOR
    parts: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in state.items():
        match = pattern.fullmatch(name)
        if match:
            # The head comes after all hidden layers.
            position, kind = (int(match[1]), match[2]) if match[1] else (10**9, match[4])
            parts.setdefault(position, {})[kind] = _checked_tensor(name, value)
        elif not UNUSED.fullmatch(name):
            raise ValueError(f"it holds {name!r}, which an MLP policy of PPO, A2C or DQN does not have")
    layers = tuple((part.get("weight"), part.get("bias")) for _, part in sorted(parts.items()))
    if not layers or len(layers) > MAX_LAYERS:
        raise ValueError(f"its network has {len(layers)} layers, not 1 to {MAX_LAYERS}")
    width = None
    for index, (weight, bias) in enumerate(layers):
        if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise ValueError(f"layer {index} of its network is not a weight (out, in) with a bias (out)")
        if width is not None and weight.shape[1] != width:
            raise ValueError(f"layer {index} of its network takes {weight.shape[1]} numbers, not {width}")
        width = weight.shape[0]
    return cast(Network, layers), action_values


def _checked_tensor(name: str, value: Any) -> torch.Tensor:
    """Return `value` as a dense float32 tensor.

    A view can have any shape with little storage, so the storage is checked before the tensor is copied.
    """
    dense = type(value) is torch.Tensor and value.layout == torch.strided and value.device.type == "cpu"
    if not dense or value.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name!r} is not a tensor of float32 or float64 on the CPU")
    size = value.numel() * value.element_size()
    if not value.numel() or size > min(MAX_WEIGHTS_BYTES, value.untyped_storage().nbytes()):
        raise ValueError(f"{name!r} of shape {tuple(value.shape)} does not hold that many numbers")
    converted: torch.Tensor = value.to(torch.float32).contiguous()
    if not torch.isfinite(converted).all():
        raise ValueError(f"{name!r} holds a value that is not finite")
    return converted


def _named_activation(data: bytes) -> Activation | None:
    """Return the activation function that `data` names in plain text; None if it names none (SB3's default).

    The JSON reader treats the pickled entries as text.
    """
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{DATA!r} is not JSON: {error}") from None
    arguments = content.get("policy_kwargs") if isinstance(content, dict) else None
    if not isinstance(arguments, dict):
        raise ValueError(f"{DATA!r} does not say how the policy was made (policy_kwargs)")
    if "features_extractor_class" in arguments:
        raise ValueError("it has a custom features extractor; only a plain MLP can be converted")
    function = arguments.get("activation_fn")
    return None if function is None else _activation_of_class(str(function))


def _activation_of_class(function: str) -> Activation:
    if function not in ACTIVATIONS:
        raise ValueError(f"its activation is {function[:80]}, not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[function]
