"""Reads and writes the record of a layer policy as `policy.json` and `policy.safetensors`.

Neither format can contain code. Reading checks every field, and the name, precision, shape and finiteness of
every tensor, so that a policy from an unknown source can be loaded safely.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray

from deepinsert.controller.runs.atomic_files import atomic_file, write_json
from deepinsert.controller.runs.json_fields import Fields, parse_object
from deepinsert.controller.statistics import Interval
from deepinsert.envs.observations import Normaliser, Observation
from deepinsert.envs.rewards.table import Bonus
from deepinsert.envs.skip_weights import SkipWeights

from .outcomes import FrontierPoint, TrainingSummary
from .policy_record import Activation, Network, PolicyRecord

DESCRIPTION = "policy.json"
WEIGHTS = "policy.safetensors"
HELD_OUT = "held_out.json"
"""The file beside them in a run folder that lists the keys of the held-out prompts."""
FORMAT = 2
MAX_JSON_BYTES = 4 * 2**20
MAX_WEIGHTS_BYTES = 256 * 2**20
MAX_LAYERS = 4096
MAX_WIDTH = 2**20
MAX_HIDDEN_LAYERS = 16
MAX_SKIP_WEIGHT = 1e9
MAX_POINTS = 1000

BONUSES = ("depth", "flops", "time")
ALGORITHMS = ("ppo", "a2c", "dqn", "full-info", "sb3")
ACTIVATIONS = ("tanh", "relu")


def write_policy(policy: PolicyRecord, folder: str | Path) -> None:
    """Write both files atomically.

    `policy.json` is written last, since it contains the SHA-256 of the weights.
    """
    tensors = {"normaliser.mean": policy.normaliser.mean, "normaliser.std": policy.normaliser.std}
    for index, (weight, bias) in enumerate(policy.network):
        tensors[f"network.{index}.weight"] = weight.numpy()
        tensors[f"network.{index}.bias"] = bias.numpy()
    weights = safetensors.numpy.save({name: np.ascontiguousarray(value) for name, value in tensors.items()})
    with atomic_file(Path(folder) / WEIGHTS) as temporary:
        temporary.write_bytes(weights)
    digest = hashlib.sha256(weights).hexdigest()
    write_json(Path(folder) / DESCRIPTION, {**_description(policy), "weights_sha256": digest})


def read_policy(folder: str | Path) -> PolicyRecord:
    """Read a policy from a folder with its two files.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if their content is not a layer policy; the error names file and field.
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
    bonus = cast(Bonus, fields.choice("bonus", *BONUSES))
    algorithm = fields.choice("algorithm", *ALGORITHMS)
    observation = _observation(fields.object("observation"))
    backbone_name, backbone_fingerprint = _backbone(fields.object("backbone"))
    table_digest = fields.digest("table_digest")
    seed = fields.integer("seed", -(2**63), 2**63)
    versions = fields.texts("versions")
    training = _training(fields.object("training"), layers, skip_weights)
    width, hidden, activation = _architecture(fields.object("network"))
    digest = fields.text("weights_sha256", 64)
    fields.finish()
    shapes = _shapes(width, width + skip_weights.num_features, (*hidden, len(layers)))
    normaliser, network = _parts(_read_tensors(folder, shapes, digest), Path(folder) / WEIGHTS)
    return PolicyRecord(
        insert_layers=layers,
        num_layers=num_layers,
        skip_weights=skip_weights,
        skip_weight=skip_weight,
        bonus=bonus,
        algorithm=algorithm,
        observation=observation,
        normaliser=normaliser,
        network=network,
        backbone_name=backbone_name,
        backbone_fingerprint=backbone_fingerprint,
        table_digest=table_digest,
        seed=seed,
        training=training,
        activation=activation,
        versions=versions,
    )


def _description(policy: PolicyRecord) -> dict[str, Any]:
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
            "frontier": [asdict(point) for point in policy.training.frontier],
        },
        "seed": policy.seed,
        "versions": policy.versions,
    }


def _check_format(fields: Fields) -> None:
    version = fields.content.get("format")
    if type(version) is int and 0 < version < FORMAT:
        raise ValueError(
            f"{fields.path}: field 'format' is {version}, which an earlier version of this software wrote; "
            f"this version reads {FORMAT}: train the policy again with deepinsert train-policy"
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


def _backbone(fields: Fields) -> tuple[str, str]:
    name, fingerprint = fields.text("name", 4096), fields.text("fingerprint")
    fields.finish()
    return name, fingerprint


def _architecture(fields: Fields) -> tuple[int, tuple[int, ...], Activation]:
    """Return the width of the observation, the units of each hidden layer, and the activation."""
    width = fields.integer("observation", 1, MAX_WIDTH)
    hidden = fields.integers("hidden", 1, MAX_WIDTH, MAX_HIDDEN_LAYERS, shortest=0)
    activation = cast(Activation, fields.choice("activation", *ACTIVATIONS))
    fields.finish()
    return width, hidden, activation


def _training(fields: Fields, layers: tuple[int, ...], skip_weights: SkipWeights) -> TrainingSummary:
    best_fixed = fields.integer("best_fixed", 0, layers[-1])
    if best_fixed not in layers:
        raise ValueError(f"{fields.path}: field 'training.best_fixed' {best_fixed} is not one of {layers}")
    advantage = fields.numbers_or_null("advantage", 3)
    training = TrainingSummary(
        prompts=fields.integer("prompts", 1, 2**63),
        loss=fields.numbers("loss", len(layers), low=0),
        flops_ratio=fields.numbers_or_null("flops_ratio", len(layers), low=0),
        best_fixed=best_fixed,
        advantage=None if advantage is None else Interval(*advantage),
        times=fields.numbers_or_null("times", len(layers), low=0),
        frontier=tuple(_point(point, skip_weights) for point in fields.objects("frontier", MAX_POINTS)),
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


def _shapes(width: int, inputs: int, outputs: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return the tensor shapes of a policy.

    Its network maps `inputs` numbers, of which `width` are observed of the prompt, through layers with
    `outputs` units.
    """
    shapes: dict[str, tuple[int, ...]] = {"normaliser.mean": (width,), "normaliser.std": (width,)}
    for index, (columns, units) in enumerate(zip((inputs, *outputs), outputs, strict=False)):
        shapes[f"network.{index}.weight"] = (units, columns)
        shapes[f"network.{index}.bias"] = (units,)
    return shapes


def _parts(tensors: Mapping[str, NDArray[np.float32]], path: Path) -> tuple[Normaliser, Network]:
    """Return normaliser and network of the tensors in `path`."""
    if not (tensors["normaliser.std"] > 0).all():
        raise ValueError(f"{path}: tensor 'normaliser.std' holds a value of 0 or less")
    normaliser = Normaliser(tensors["normaliser.mean"], tensors["normaliser.std"])
    layers = (len(tensors) - 2) // 2
    network = tuple(
        (
            torch.from_numpy(tensors[f"network.{index}.weight"]),
            torch.from_numpy(tensors[f"network.{index}.bias"]),
        )
        for index in range(layers)
    )
    return normaliser, network


def _read_tensors(
    folder: str | Path, shapes: Mapping[str, tuple[int, ...]], sha256: str
) -> dict[str, NDArray[np.float32]]:
    """Read the tensors of `policy.safetensors`: exactly those of `shapes`, float32 and finite."""
    path = Path(folder) / WEIGHTS
    data = _read(path, MAX_WEIGHTS_BYTES)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(
            f"{path} does not belong to the {DESCRIPTION} beside it (field 'weights_sha256'); copy both "
            "files again, or train the policy again"
        )
    try:
        stored = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]  # it has no annotations
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    for name in sorted(stored.keys() ^ shapes.keys()):
        problem = "is missing" if name in shapes else "is not part of a layer policy"
        raise ValueError(f"{path}: tensor {name!r} {problem}")
    tensors = {}
    for name, shape in shapes.items():
        entry = stored[name]
        if entry["dtype"] != "F32" or tuple(entry["shape"]) != shape:
            actual = f"{entry['dtype']} {tuple(entry['shape'])}"
            raise ValueError(f"{path}: tensor {name!r} is {actual}, {DESCRIPTION} describes F32 {shape}")
        values = np.frombuffer(entry["data"], dtype="<f4").reshape(shape).astype(np.float32)
        if not np.isfinite(values).all():
            raise ValueError(f"{path}: tensor {name!r} holds a value that is not finite")
        tensors[name] = values
    return tensors


def _read(path: Path, max_bytes: int) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the run folder of deepinsert train-policy")
    if path.stat().st_size > max_bytes:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, more than a layer policy's {max_bytes}")
    return path.read_bytes()
