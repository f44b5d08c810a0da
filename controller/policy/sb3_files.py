"""Takes the network out of a policy that somebody trained with Stable-Baselines3, and nothing else.

`PPO.load` unpickles what `data` inside the zip holds, which runs whatever code its author put there. Here the
tensors of `policy.pth` are read without it, within bounds, and every other file is left shut, but for the
name of the activation function, which stands in `data` in plain JSON.
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
from typing import Any, Literal, cast

import torch

MAX_ZIP_BYTES = 256 * 2**20
MAX_WEIGHTS_BYTES = 256 * 2**20
MAX_DATA_BYTES = 64 * 2**20
MAX_LAYERS = 16

WEIGHTS = "policy.pth"
DATA = "data"

Activation = Literal["tanh", "relu"]
Layers = tuple[tuple[torch.Tensor, torch.Tensor], ...]

# All that the pickle of a state dict of float tensors refers to.
GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch FloatStorage",
    "torch DoubleStorage",
}
# Opcodes that name or build objects in other ways than torch.save does.
OTHER_WAYS = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
ACTIVATIONS: dict[str, Activation] = {
    "<class 'torch.nn.modules.activation.Tanh'>": "tanh",
    "<class 'torch.nn.modules.activation.ReLU'>": "relu",
}
ACTOR = re.compile(r"mlp_extractor\.policy_net\.(\d+)\.(weight|bias)|(action_net)\.(weight|bias)")
ACTION_VALUES = re.compile(r"q_net\.q_net\.(\d+)\.(weight|bias)")
UNUSED = re.compile(r"(mlp_extractor\.value_net|value_net|q_net_target\.q_net)\.[\d.]*(weight|bias)")


@dataclass(frozen=True)
class SB3Network:
    """An MLP: weight (out, in) and bias (out) of each linear layer, float32, with `activation` between them.

    `action_values` says that it gives the value of each action (DQN), not logits.
    """

    layers: Layers
    activation: Activation
    action_values: bool


def read_network(path: str | Path, activation: Activation | None = None) -> SB3Network:
    """The network in a zip that `PPO.save`, `A2C.save` or `DQN.save` wrote. Runs nothing from it.

    Where `activation` is not given, it is the one that the zip names. Raises `FileNotFoundError` where there
    is no such file and `ValueError`, naming it, where it is no such zip, is larger than a layer policy can be
    or holds another network than an MLP.
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
        raise ValueError(f"{path}: not a zip of SB3 with an MLP policy: {error}") from None
    return SB3Network(layers, cast(Activation, activation), action_values)


def network_of_model(model: Any, activation: Activation | None = None) -> SB3Network:
    """The network of a PPO, A2C or DQN in hand; see `read_network`."""
    from stable_baselines3.common.torch_layers import FlattenExtractor

    policy = model.policy
    extractor = getattr(policy, "features_extractor", None) or policy.q_net.features_extractor
    if not isinstance(extractor, FlattenExtractor):
        raise ValueError(f"{type(extractor).__name__} before the network: only a plain MLP can be taken over")
    state = {name: value.detach().cpu().clone() for name, value in policy.state_dict().items()}
    layers, action_values = _linear_layers(state)
    function = f"<class '{policy.activation_fn.__module__}.{policy.activation_fn.__qualname__}'>"
    return SB3Network(layers, activation or _known_activation(function), action_values)


def _member(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """The bytes of one file in the zip. Its header may lie, so no more than `most` are ever unpacked."""
    found = [info for info in archive.infolist() if info.filename == name]
    if len(found) != 1:
        raise ValueError(f"it holds {len(found)} files named {name!r}, not 1")
    with archive.open(found[0]) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{name!r} unpacks to more than {most} bytes")
    return content


def _state_dict(content: bytes) -> dict[str, torch.Tensor]:
    """The tensors of a `policy.pth`, read by torch's restricted unpickler after a look at what it names."""
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
    except Exception as error:  # whatever a broken file makes it raise
        raise ValueError(f"{WEIGHTS!r} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise ValueError(f"{WEIGHTS!r} is not a dictionary of tensors")
    return loaded


def _check_names(pickled: bytes) -> None:
    """Refuse a pickle that refers to anything but what a dictionary of tensors needs."""
    try:
        found = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(pickled)]
    except Exception as error:  # whatever a broken file makes it raise
        raise ValueError(f"{WEIGHTS!r} is broken: {error}") from None
    for name, argument in found:
        if name == "GLOBAL" and argument not in GLOBALS:
            raise ValueError(f"{WEIGHTS!r} refers to {argument!r}, which is no part of a network's tensors")
        if name in OTHER_WAYS:
            raise ValueError(f"{WEIGHTS!r} was not written by torch.save: it holds the opcode {name}")


def _linear_layers(state: Mapping[str, Any]) -> tuple[Layers, bool]:
    """The linear layers from observation to logits, or to action values, in order."""
    action_values = any(ACTION_VALUES.fullmatch(name) for name in state)
    wanted = ACTION_VALUES if action_values else ACTOR
    parts: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in state.items():
        match = wanted.fullmatch(name)
        if match:
            # The head comes after every hidden layer.
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
    return cast(Layers, layers), action_values


def _checked_tensor(name: str, value: Any) -> torch.Tensor:
    """`value` as dense float32. A view can claim any size, so it is not copied before that is known."""
    plain = type(value) is torch.Tensor and value.layout == torch.strided and value.device.type == "cpu"
    if not plain or value.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name!r} is not a tensor of float32 or float64 on the CPU")
    size = value.numel() * value.element_size()
    if not value.numel() or size > min(MAX_WEIGHTS_BYTES, value.untyped_storage().nbytes()):
        raise ValueError(f"{name!r} of shape {tuple(value.shape)} does not hold the numbers it claims")
    converted = value.to(torch.float32).contiguous()
    if not torch.isfinite(converted).all():
        raise ValueError(f"{name!r} holds a value that is not finite")
    return converted


def _named_activation(data: bytes) -> Activation | None:
    """The activation function that `data` names in plain text; None where it names none (SB3's default).

    Its serialised entries are text to the JSON reader, and stay text.
    """
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{DATA!r} is not JSON: {error}") from None
    arguments = content.get("policy_kwargs") if isinstance(content, dict) else None
    if not isinstance(arguments, dict):
        raise ValueError(f"{DATA!r} does not say how the policy was made (policy_kwargs)")
    if "features_extractor_class" in arguments:
        raise ValueError("it has a features extractor of its own; only a plain MLP can be taken over")
    named = arguments.get("activation_fn")
    return None if named is None else _known_activation(str(named))


def _known_activation(function: str) -> Activation:
    if function not in ACTIVATIONS:
        raise ValueError(f"its activation is {function[:80]}, not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[function]
