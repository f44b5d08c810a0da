"""Reads and writes a layer policy as `policy.json` and `policy.safetensors`, trusting nothing in them.

Neither format can hold code. Every field is checked, and every tensor for name, precision, shape and finite
values, so that a policy from somewhere else can be loaded without running or believing anything of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray

from deepinsert.controller.runs.folder import replacing, write_json
from deepinsert.controller.runs.json_fields import Fields, parse_object
from deepinsert.controller.statistics import Interval
from deepinsert.envs.observations import Normaliser, Observation
from deepinsert.envs.skip_weights import SkipWeights

from .expectations import Training
from .frontier import FrontierPoint

if TYPE_CHECKING:
    from .layer_policy import LayerPolicy

DESCRIPTION = "policy.json"
WEIGHTS = "policy.safetensors"
HELD_OUT = "held_out.json"
"""Beside them in a run folder: the keys of the prompts that training kept for judging."""
FORMAT = 2
MAX_JSON_BYTES = 4 * 2**20
MAX_WEIGHTS_BYTES = 256 * 2**20
MAX_LAYERS = 4096
MAX_WIDTH = 2**20
MAX_SKIP_WEIGHT = 1e9
MAX_POINTS = 1000

BONUSES = ("depth", "flops", "time")
ALGORITHMS = ("ppo", "a2c", "dqn", "full-info", "sb3")
ACTIVATIONS = ("tanh", "relu")


def write_policy(policy: LayerPolicy, folder: str | Path) -> None:
    """Write both files atomically, `policy.json` last: it names the SHA-256 of the weights it belongs to."""
    tensors = {"normaliser.mean": policy.normaliser.mean, "normaliser.std": policy.normaliser.std}
    for index, (weight, bias) in enumerate(policy.network):
        tensors[f"network.{index}.weight"] = weight.numpy()
        tensors[f"network.{index}.bias"] = bias.numpy()
    weights = safetensors.numpy.save({name: np.ascontiguousarray(value) for name, value in tensors.items()})
    with replacing(Path(folder) / WEIGHTS) as temporary:
        temporary.write_bytes(weights)
    digest = hashlib.sha256(weights).hexdigest()
    write_json(Path(folder) / DESCRIPTION, {**_description(policy), "weights_sha256": digest})


def read_policy(folder: str | Path) -> dict[str, Any]:
    """What `LayerPolicy` is made of, from a folder with its two files.

    Raises `FileNotFoundError` where one is absent and `ValueError`, naming file and field, where their
    content is not a layer policy.
    """
    path = Path(folder) / DESCRIPTION
    fields = parse_object(path, _read(path, MAX_JSON_BYTES), "a policy description")
    _check_format(fields)
    num_layers = fields.integer("num_layers", 1, MAX_LAYERS)
    layers = fields.integers("insert_layers", 0, num_layers, num_layers + 1)
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"{path}: field 'insert_layers' {list(layers)} is not ascending")
    skip_weights = _skip_weights(fields.object("skip_weights"))
    skip_weight = fields.number("skip_weight", skip_weights.low, skip_weights.high)
    identity = fields.object("backbone")
    policy: dict[str, Any] = dict(
        insert_layers=layers,
        num_layers=num_layers,
        skip_weights=skip_weights,
        skip_weight=skip_weight,
        bonus=fields.choice("bonus", *BONUSES),
        algorithm=fields.choice("algorithm", *ALGORITHMS),
        observation=_observation(fields.object("observation")),
        backbone_name=identity.text("name", 4096),
        backbone_fingerprint=identity.text("fingerprint"),
        table_digest=fields.digest("table_digest"),
        seed=fields.integer("seed", -(2**63), 2**63),
        versions=fields.texts("versions"),
        training=_training(fields.object("training"), layers, skip_weights),
    )
    identity.finish()
    network = fields.object("network")
    observed = network.integer("observation", 1, MAX_WIDTH)
    hidden = network.integers("hidden", 1, MAX_WIDTH, 16, shortest=0)
    policy["activation"] = network.choice("activation", *ACTIVATIONS)
    network.finish()
    digest = fields.text("weights_sha256", 64)
    fields.finish()
    inputs = observed + skip_weights.feature([skip_weight]).shape[1]
    tensors = _read_tensors(folder, _shapes(observed, inputs, (*hidden, len(layers))), digest)
    if not (tensors["normaliser.std"] > 0).all():
        raise ValueError(f"{Path(folder) / WEIGHTS}: tensor 'normaliser.std' holds a value of 0 or less")
    policy["normaliser"] = Normaliser(tensors["normaliser.mean"], tensors["normaliser.std"])
    policy["network"] = tuple(
        (
            torch.from_numpy(tensors[f"network.{index}.weight"]),
            torch.from_numpy(tensors[f"network.{index}.bias"]),
        )
        for index in range(len(hidden) + 1)
    )
    return policy


def _description(policy: LayerPolicy) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "insert_layers": policy.insert_layers,
        "num_layers": policy.num_layers,
        "skip_weights": asdict(policy.skip_weights),
        "skip_weight": policy.skip_weight,
        "bonus": policy.bonus,
        "algorithm": policy.algorithm,
        "observation": asdict(policy.observation),
        "backbone": {"name": policy.backbone_name, "fingerprint": policy.backbone_fingerprint},
        "table_digest": policy.table_digest,
        "network": {
            "observation": len(policy.normaliser.mean),
            "hidden": [len(bias) for _, bias in policy.network[:-1]],
            "activation": policy.activation,
        },
        "training": {
            "prompts": policy.training.prompts,
            "loss": policy.training.loss,
            "flops_ratio": policy.training.flops_ratio,
            "times": policy.training.times,
            "best_fixed": policy.training.best_fixed,
            "advantage": policy.training.advantage,
            "frontier": [asdict(item) for item in policy.training.frontier],
        },
        "seed": policy.seed,
        "versions": policy.versions,
    }


def _check_format(fields: Fields) -> None:
    found = fields.content.get("format")
    if type(found) is int and 0 < found < FORMAT:
        raise ValueError(
            f"{fields.path}: field 'format' is {found}, that of an earlier version of this software, which "
            f"reads {FORMAT}: train the policy again with deepinsert train-policy"
        )
    fields.integer("format", FORMAT, FORMAT)


def _skip_weights(fields: Fields) -> SkipWeights:
    low = fields.number("low", 0, MAX_SKIP_WEIGHT)
    high = fields.number("high", low, MAX_SKIP_WEIGHT)
    fields.finish()
    return SkipWeights(low, high)


def _observation(fields: Fields) -> Observation:
    observation = Observation(fields.integer("text_layer", 0, MAX_LAYERS), fields.flag("image"))
    fields.finish()
    return observation


def _training(fields: Fields, layers: tuple[int, ...], skip_weights: SkipWeights) -> Training:
    best_fixed = fields.integer("best_fixed", 0, layers[-1])
    if best_fixed not in layers:
        raise ValueError(f"{fields.path}: field 'training.best_fixed' {best_fixed} is not one of {layers}")
    advantage = fields.numbers_or_null("advantage", 3)
    training = Training(
        prompts=fields.integer("prompts", 1, 2**63),
        loss=fields.numbers("loss", len(layers), low=0),
        flops_ratio=fields.numbers_or_null("flops_ratio", len(layers), low=0),
        best_fixed=best_fixed,
        advantage=None if advantage is None else Interval(*advantage),
        times=fields.numbers_or_null("times", len(layers), low=0),
        frontier=tuple(_point(item, skip_weights) for item in fields.objects("frontier", MAX_POINTS)),
    )
    fields.finish()
    return training


def _point(fields: Fields, skip_weights: SkipWeights) -> FrontierPoint:
    point = FrontierPoint(
        skip_weight=fields.number("skip_weight", skip_weights.low, skip_weights.high),
        loss=fields.number("loss", low=0),
        loss_increase=fields.number_or_null("loss_increase"),
        flops_ratio=fields.number_or_null("flops_ratio", low=0),
        reward=fields.number("reward"),
    )
    fields.finish()
    return point


def _shapes(observed: int, inputs: int, outputs: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of a network from `inputs` numbers, `observed` of them of the prompt, through layers with
    `outputs` units."""
    shapes: dict[str, tuple[int, ...]] = {"normaliser.mean": (observed,), "normaliser.std": (observed,)}
    for index, (width, units) in enumerate(zip((inputs, *outputs), outputs, strict=False)):
        shapes[f"network.{index}.weight"] = (units, width)
        shapes[f"network.{index}.bias"] = (units,)
    return shapes


def _read_tensors(
    folder: str | Path, shapes: Mapping[str, tuple[int, ...]], sha256: str
) -> dict[str, NDArray[np.float32]]:
    """The tensors of `policy.safetensors`: exactly those of `shapes`, float32 and finite."""
    path = Path(folder) / WEIGHTS
    data = _read(path, MAX_WEIGHTS_BYTES)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(
            f"{path}: does not belong to the {DESCRIPTION} beside it (field 'weights_sha256'); copy both "
            "files again, or train again"
        )
    try:
        stored = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from None
    for name in sorted(stored.keys() ^ shapes.keys()):
        known = "is missing" if name in shapes else "is not part of a layer policy"
        raise ValueError(f"{path}: tensor {name!r} {known}")
    tensors = {}
    for name, shape in shapes.items():
        entry = stored[name]
        if entry["dtype"] != "F32" or tuple(entry["shape"]) != shape:
            found = f"{entry['dtype']} {tuple(entry['shape'])}"
            raise ValueError(f"{path}: tensor {name!r} is {found}, {DESCRIPTION} describes F32 {shape}")
        values = np.frombuffer(entry["data"], dtype="<f4").reshape(shape).astype(np.float32)
        if not np.isfinite(values).all():
            raise ValueError(f"{path}: tensor {name!r} holds a value that is not finite")
        tensors[name] = values
    return tensors


def _read(path: Path, most: int) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the run folder of deepinsert train-policy")
    if path.stat().st_size > most:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, more than a layer policy's {most}")
    return path.read_bytes()
