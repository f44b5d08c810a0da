"""Computes cells of a reward table with the backbone, for all prompts of a group together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from deepinsert.backbones import Backbone, CostModel
from deepinsert.envs.prompts import Prompt

from .block_forward import BlockForward, prefill_flops
from .cells import Cells, FloatArray
from .group_forward import GroupForward
from .keys import IntArray, distinct

METHOD = "shared-1"
"""Recorded in every file; losses computed by another method differ in their last bits."""


class CellComputer:
    """Computes the cells of prompts with a backbone.

    Args:
        backbone: the backbone.
        prompts: the P prompts of the table.
        prompt_keys: the keys of their contents.
        batch_tokens: bounds the tokens of a forward.
    """

    def __init__(
        self, backbone: Backbone, prompts: Sequence[Prompt], prompt_keys: Sequence[str], batch_tokens: int
    ) -> None:
        self.backbone = backbone
        self.prompts, self.prompt_keys = prompts, prompt_keys
        self.forward = GroupForward(backbone, batch_tokens)

    @property
    def origin(self) -> dict[str, Any]:
        """What the losses are computed with: weights, precision, depth and method."""
        return {
            "fingerprint": self.backbone.fingerprint,
            "dtype": str(self.backbone.model.dtype).removeprefix("torch."),
            "num_layers": self.backbone.num_layers,
            "method": METHOD,
        }

    def compute(self, cells: Cells, members: IntArray, columns: IntArray) -> None:
        """Fill the cells of all prompts of a group at some candidates.

        A prompt that occurs several times in the group is computed once: its content alone decides its loss.

        Args:
            cells: the table's cells.
            members: indices of the group's prompts.
            columns: indices of the candidates, ascending.

        Raises:
            ValueError: if a loss is not finite; it names the prompt and the insert layer.
        """
        first, position = distinct([self.prompt_keys[index] for index in members])
        prompts = [self.prompts[index] for index in members[first]]
        layers = [cells.insert_layers[column] for column in columns]
        result = self.forward.run(prompts, layers)
        if not np.isfinite(result.losses).all():
            row, column = np.argwhere(~np.isfinite(result.losses))[0]
            raise ValueError(
                f"the loss of prompt {prompts[row].id!r} at insert layer {layers[column]} is "
                f"{result.losses[row, column]}; check that its answer is not empty, or try another --dtype"
            )
        target = np.ix_(members, columns)
        cells.losses[target] = result.losses[position]
        cells.first_tokens[target] = result.first_tokens[position]
        cells.greedy[target] = result.greedy[position]
        if 0 in layers:
            cells.first_tokens[members, -1] = result.first_tokens[position, layers.index(0)]
        tokens = result.text_tokens[position], result.multimodal_tokens[position]
        cells.flops[members] = self._prefill_flops(cells, members, *tokens)

    def count_flops(self, cells: Cells, members: IntArray) -> None:
        """Fill the FLOPs of some prompts from their numbers of tokens, without a forward."""
        block = BlockForward(self.backbone, [self.prompts[index] for index in members])
        tokens = block.count_tokens(block.encode(slice(None)))
        cells.flops[members] = self._prefill_flops(cells, members, *tokens)

    def _prefill_flops(
        self, cells: Cells, members: IntArray, text_tokens: IntArray, multimodal_tokens: IntArray
    ) -> FloatArray:
        """Return the prefill FLOPs (rows, K + 1) at the candidates and, last, at layer 0."""
        prompts = [self.prompts[index] for index in members]
        layers = (*cells.insert_layers, 0)
        return prefill_flops(self._costs, prompts, text_tokens, multimodal_tokens, layers)

    @cached_property
    def _costs(self) -> CostModel:
        return CostModel.from_model(self.backbone.model)
