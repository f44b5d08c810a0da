"""One model for all depths: each row of a training batch at an insert layer that it draws anew in each epoch.

The draw is uniform, or a layer policy's; answers can be learnt from the same model at insert layer 0 as well
as from labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from deepinsert.backbones import Backbone, insert_at
from deepinsert.backbones.compat.accelerate import is_sharded
from deepinsert.controller.option_checks import parse_layers
from deepinsert.controller.options import FinetuneOptions
from deepinsert.controller.policy.layer_policy import LayerPolicy
from deepinsert.envs.prompts import IGNORED, Prompt

UNIFORM = "uniform"
TRAINED = "trained_layers"
STEPS_STREAM = 1  # sets the draws of whole steps apart from those of rows


@dataclass(eq=False)
class DepthSampler:
    """Draws an insert layer of `candidates` (K) for each of P prompts in each epoch.

    `multimodal` (P) says which prompts have multimodal tokens; the others stay at layer 0, since no layer
    means anything to them. `probabilities` (P, K) are each prompt's own, None makes every candidate equally
    likely. `distillation` is the weight of the loss towards the model's own answers at layer 0.

    A draw depends on the seed, the epoch and the prompt's position in the data alone: not on the batch that
    the prompt is in, on how many processes share the work, or on where a run was continued.
    """

    candidates: tuple[int, ...]
    multimodal: NDArray[np.bool_]
    seed: int = 0
    probabilities: NDArray[np.float64] | None = None
    distillation: float = 0.0
    source: str = UNIFORM
    """What the probabilities come from, for the identity of a run."""
    drawn: dict[int, NDArray[np.int64]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.candidates or min(self.candidates) < 0:
            raise ValueError(f"insert layers {self.candidates}: give at least one, each 0 or above")
        if not 0 <= self.distillation <= 1:
            raise ValueError(f"--distillation {self.distillation}: give a weight between 0 and 1")
        wanted = (len(self.multimodal), len(self.candidates))
        if self.probabilities is not None and self.probabilities.shape != wanted:
            raise ValueError(
                f"probabilities of shape {self.probabilities.shape} for {wanted[0]} prompts and {wanted[1]} "
                "candidates: give a row for each prompt"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the draws, for the manifest of a checkpoint."""
        return {"trained layers": list(self.candidates), "layer distribution": self.source}

    def layers(self, epoch: int) -> NDArray[np.int64]:
        """The insert layer (P) of every prompt in one epoch."""
        if epoch not in self.drawn:
            chances = np.random.default_rng([self.seed, epoch]).random(len(self.multimodal))
            layers = np.array(self.candidates)[self._columns(chances, self.probabilities)]
            self.drawn = {epoch: np.where(self.multimodal, layers, 0)}
        return self.drawn[epoch]

    def rows(self, positions: Sequence[int], epoch: int) -> list[int]:
        """The insert layers of the prompts at `positions` (B)."""
        return self.layers(epoch)[np.asarray(positions, dtype=np.int64)].tolist()

    def of_step(self, step: int) -> int:
        """One insert layer for all rows of an optimiser step, the same in every process: where weights are
        sharded, processes gather those of each decoder layer together and must call it equally often."""
        chance = np.random.default_rng([self.seed, step, STEPS_STREAM]).random(1)
        means = None
        if self.probabilities is not None:
            own = self.probabilities[self.multimodal] if self.multimodal.any() else self.probabilities
            means = own.mean(axis=0, keepdims=True)
        return int(self.candidates[int(self._columns(chance, means)[0])])

    def _columns(
        self, chances: NDArray[np.float64], probabilities: NDArray[np.float64] | None
    ) -> NDArray[np.int64]:
        """The candidate (n) that each of the numbers `chances` (n) in [0, 1) falls on."""
        most = len(self.candidates) - 1
        if probabilities is None:
            return np.minimum((chances * len(self.candidates)).astype(np.int64), most)
        shares = probabilities.cumsum(axis=1)
        # The last sum may be below 1 by a rounding.
        return np.minimum((chances[:, None] >= shares / shares[:, -1:]).sum(axis=1), most)

    def loss(
        self,
        trainer: Any,
        stock: Callable[..., Any],
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Any = None,
    ) -> tuple[Tensor, Any]:
        """Loss and outputs of one batch for a `Trainer`'s `compute_loss`, each row at the layer it drew.

        `inputs` hold `row_index` (B,), the prompts' positions in the data; `stock` is the Trainer's own
        `compute_loss`. While the model is evaluated, every row is at the layer in force.
        """
        inputs = dict(inputs)
        positions = inputs.pop("row_index").tolist()
        if not model.training:
            return stock(model, inputs, True, num_items_in_batch)
        state = trainer.state
        if is_sharded(trainer.accelerator.state):
            layers = [self.of_step(state.global_step)]
        else:
            layers = self.rows(positions, int(state.epoch or 0))
        with insert_at(trainer.accelerator.unwrap_model(model), layers if len(layers) > 1 else layers[0]):
            loss, outputs = stock(model, inputs, True, num_items_in_batch)
        taught = self.multimodal[positions] & (np.array(layers) > 0)
        if self.distillation and (is_sharded(trainer.accelerator.state) or taught.any()):
            loss = loss + self._distilled(trainer, model, inputs, outputs, taught, num_items_in_batch)
        return loss, outputs

    def _distilled(
        self,
        trainer: Any,
        model: nn.Module,
        inputs: dict[str, Any],
        outputs: Any,
        taught: NDArray[np.bool_],
        num_items_in_batch: Any,
    ) -> Tensor:
        """What distillation adds to the stock loss of a batch: on the answers of the rows `taught` (B), a
        share of the cross-entropy gives way to the divergence from layer 0.

        In-place distillation of slimmable networks (Yu and Huang 2019, arXiv 1903.05134): the whole network
        learns from labels, its parts from what the whole says, without a gradient to the whole. Weight 1 is
        theirs; below it, labels keep the rest.
        """
        labels = inputs["labels"]
        kept = (labels[:, 1:] != IGNORED) & torch.from_numpy(taught).to(labels.device)[:, None]
        asked = {name: value for name, value in inputs.items() if name != "labels"}
        stock = trainer.accelerator.unwrap_model(model)
        # A call of the wrapper is one that all processes must make: DDP's shares its buffers.
        called = model if is_sharded(trainer.accelerator.state) else stock
        model.eval()  # the teacher answers without dropout
        with torch.no_grad(), insert_at(stock, 0):
            teacher = called(**asked).logits[:, :-1][kept]
        model.train()
        student = outputs.logits[:, :-1][kept]
        teacher_log, student_log = (logits.float().log_softmax(dim=-1) for logits in (teacher, student))
        divergence = F.kl_div(student_log, teacher_log, log_target=True, reduction="sum")
        own = F.nll_loss(student_log, labels[:, 1:][kept], reduction="sum")
        counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        items = num_items_in_batch if counted else (labels[:, 1:] != IGNORED).sum()
        change = self.distillation * (divergence - own) / items
        # As the Trainer does, whose gradients are averaged over processes.
        return change * trainer.accelerator.num_processes if counted else change


def make_depths(
    options: FinetuneOptions, backbone: Backbone, prompts: Sequence[Prompt]
) -> DepthSampler | None:
    """What draws the layers of `--insert-layer random` for these prompts; None for a fixed layer.

    A policy looks at each prompt once, before training changes the backbone. Raises `ValueError` for layers
    that the backbone does not have, and for a policy of another backbone.
    """
    if options.insert_layer != "random":
        return None
    multimodal = np.array([bool(prompt.images) for prompt in prompts])
    if not multimodal.any():
        raise ValueError(
            f"--insert-layer random: none of the {len(prompts)} records of {options.data} has an image, and "
            "text alone enters at layer 0"
        )
    if options.layer_distribution == UNIFORM:
        candidates = parse_layers(options.insert_layers, backbone.num_layers)
        return DepthSampler(candidates, multimodal, options.seed, distillation=options.distillation)
    folder = Path(options.layer_distribution)
    policy = LayerPolicy.load(folder, backbone)
    policy.checked_backbone()
    probabilities = np.full((len(prompts), len(policy.insert_layers)), 1 / len(policy.insert_layers))
    asked = [prompt for prompt in prompts if prompt.images]
    observed = policy.observation(backbone, asked, options.batch_size)
    probabilities[multimodal] = policy.probabilities(observed)
    return DepthSampler(
        policy.insert_layers,
        multimodal,
        options.seed,
        probabilities,
        options.distillation,
        source=digest_of(folder),
    )


def fixed_layer(options: FinetuneOptions) -> int:
    """The insert layer in force beside what rows draw: that of the checkpoint."""
    return 0 if options.insert_layer == "random" else options.insert_layer


def record_depths(backbone: Backbone, depths: DepthSampler | None) -> None:
    """Write the layers that the model is trained for to its configuration, which its checkpoint keeps; what
    an earlier training wrote there goes."""
    trained = {TRAINED: list(depths.candidates)} if depths else {}
    backbone.model.config.deepinsert = {"insert_layer": backbone.insert_layer, **trained}


def trained_layers(backbone: Backbone) -> dict[str, Any]:
    """What `record_depths` wrote, as an entry of `result.json`; empty for a fixed layer."""
    said = backbone.model.config.deepinsert
    return {TRAINED: said[TRAINED]} if TRAINED in said else {}


def digest_of(folder: Path) -> str:
    """16 hex digits over the files of a policy."""
    total = hashlib.sha256()
    for name in ("policy.json", "policy.safetensors"):
        total.update((folder / name).read_bytes())
    return total.hexdigest()[:16]
