"""Evaluates many continuations of shared multimodal prefixes at many insert layers, sharing all common work.

Attention is causal, so earlier rows do not depend on later ones. The encoder runs once. The text before the
features runs once for all prompts that begin with it; the rows of the features run once per insert layer; and
below an insert layer, where no row attends to features, the rows of a continuation run once for all layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from deepinsert.backbones.compat.transformers import cache_name
from deepinsert.backbones.families import base_model_of

from .calls import Arguments, StockCall
from .insertion import insertion_of
from .layer_range import LayerRange, mask_of_layers
from .positions import ObservedPositions
from .routing import Insertion
from .sharing_checks import (
    ADDED_BETWEEN_LAYERS,
    REBUILT_ARGUMENTS,
    ROW_DIMENSION,
    CannotShareError,
    check_arguments,
    check_can_share,
)

__all__ = ["Branches", "CannotShareError", "SharedPrefix", "Texts"]

Texts = dict[tuple[int, ...], DynamicCache]
"""The keys and values of texts that prompts begin with, by their token ids."""

MOST_TEXTS = 16
"""How many texts are stored; the oldest ones are dropped first."""


@dataclass(frozen=True)
class Branches:
    """Texts that continue prefixes, in W trees of R tokens.

    A tree with fewer than R tokens is filled with tokens that only they themselves attend to.

    Args:
        owner: (W,) the prefix that each tree continues.
        ids: (W, R) the token ids.
        depth: (W, R) the distance of each token from the end of the prefix, from 0 on.
        visible: (W, R, R) bool, the tokens of the tree that each one attends to: its predecessors and itself.
    """

    owner: Tensor
    ids: Tensor
    depth: Tensor
    visible: Tensor


class RangeOutput(NamedTuple):
    """The output of a range of layers: last states (B, R, D), recorded inputs by layer, and the cache."""

    states: Tensor
    inputs: dict[int, Tensor]
    cache: DynamicCache


class _StackOutput(BaseModelOutputWithPast):
    """The output of a replaced stack; attributes that only some stacks return are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class SharedPrefix:
    """The rows of B prompts up to their last multimodal token, continued by many texts each."""

    def __init__(self, model: Any, inputs: Mapping[str, Tensor], length: int, texts: Texts) -> None:
        """Run the encoder and the text before the features.

        Args:
            model: A model that `deep_insert` was called on.
            inputs: Its inputs for B prompts. Behind its prefix, each prompt has a text that is at least as
                long as its deepest branch, padded on the right.
            length: The length of the prefix, which has the same ids in each prompt, with other features.
            texts: The texts that earlier prompts began with; it is extended.

        Raises:
            CannotShareError: The model's rows depend on more than the rows before them.
            ValueError: The prefixes have different ids.
        """
        self.model = base_model_of(model)
        self.insertion: Insertion = insertion_of(model)
        self.num_layers = self.insertion.limits.num_layers
        check_can_share(self.model, self.insertion)
        self.in_tuples = False
        self.call, multimodal = self._stack_input(inputs)
        check_arguments(self.call)
        if multimodal is None or not multimodal[0, length - 1] or multimodal[:, length:].any():
            raise CannotShareError("its prefix does not end with the last multimodal token")
        ids = inputs["input_ids"]
        self.batch, total = ids.shape
        if not (ids[:, :length] == ids[0, :length]).all():
            raise ValueError(
                "the prefixes have different tokens: group prompts by the tokens of their prefix"
            )
        if self.call.get("position_ids") is None:
            self.call["position_ids"] = torch.arange(total, device=multimodal.device)[None]
        self.prefix = torch.arange(length, device=multimodal.device)
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        self.sample_ids, self.sample_mask = ids[:, length:], mask[:, length:].bool()
        begin = int(multimodal[0].int().argmax())
        self.leading, self.rest = self.prefix[:begin], self.prefix[begin:]
        self.is_text = ~multimodal[0, begin:length]
        self.leading_cache = self._leading_text(ids[0, :begin].tolist(), texts)

    def run(
        self, branches: Sequence[Branches], insert_layers: Sequence[int]
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Compute the final hidden states of all branches at all insert layers.

        Yields:
            The insert layer, the index in `branches`, and the states (W, R, D).
        """
        recorded = frozenset(insert_layers)
        prefix_text = self._prefix_text(recorded)
        calls = self._branch_inputs(branches)
        text_only = [
            self._branch_text_only(branch, call, prefix_text.cache, recorded)
            for branch, call in zip(branches, calls, strict=True)
        ]
        for layer in insert_layers:
            if layer == self.num_layers:
                yield from ((layer, index, output.states) for index, output in enumerate(text_only))
                continue
            prefix_cache = self._prefix_at(layer, prefix_text)
            for index, (branch, call) in enumerate(zip(branches, calls, strict=True)):
                cache = select_cache_rows(prefix_cache, branch.owner, self.batch)
                states = text_only[index].inputs.get(layer)
                rows = len(self.prefix) + branch.depth
                output = self._run(call, self.prefix, rows, branch.visible, cache, start=layer, states=states)
                yield layer, index, output.states

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits (R, V) of final hidden states (R, D), through the model's own head."""

        def return_states(stock: StockCall, call: Arguments, observed: ObservedPositions) -> Any:
            return _StackOutput(last_hidden_state=states[None])

        placeholder_ids = self.insertion.placeholder_ids
        word = next(token for token in range(len(placeholder_ids) + 1) if token not in placeholder_ids)
        with self.insertion.stack_replaced(return_states):
            ids = torch.full((1, 1), word, device=states.device)
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        return logits

    def _stack_input(self, inputs: Mapping[str, Tensor]) -> tuple[Arguments, Tensor | None]:
        """Return the arguments that the model passes to its stack, and the multimodal positions (1, S)."""
        captured: list[Any] = []

        def capture(stock: StockCall, call: Arguments, observed: ObservedPositions) -> Any:
            embeds = call.get("inputs_embeds")
            if embeds is None:
                raise CannotShareError("its decoder stack embeds the tokens itself")
            self.stock = stock
            captured.extend([call, observed.multimodal(embeds, self.insertion.placeholder_ids, None)])
            return _StackOutput(last_hidden_state=embeds[:, -1:])

        with self.insertion.stack_replaced(capture):
            self.model(**inputs, use_cache=False)
        return captured[0], captured[1]

    def _leading_text(self, ids: list[int], texts: Texts) -> DynamicCache:
        """Return the keys and values of the text before the first multimodal token, in every layer."""
        key = tuple(ids)
        if not key:
            return DynamicCache()
        if key not in texts:
            while len(texts) >= MOST_TEXTS:
                del texts[next(iter(texts))]
            call = self._select_rows(self.leading)
            call["inputs_embeds"] = call["inputs_embeds"][:1]
            if call["position_ids"].ndim > 2 or len(call["position_ids"]) > 1:
                call["position_ids"] = call["position_ids"][..., :1, :]
            rows = self.leading
            texts[key] = self._run(call, rows[:0], rows[None], causal(rows), DynamicCache()).cache
        return select_cache_rows(texts[key], self.prefix.new_zeros(self.batch), 1)

    def _prefix_text(self, recorded: frozenset[int]) -> RangeOutput:
        """Run the text between multimodal tokens through the layers that hold text only."""
        rows = self.rest[self.is_text]
        if not len(rows):
            return RangeOutput(rows[None], {}, self.leading_cache)
        return self._run(
            self._select_rows(rows),
            self.leading,
            rows[None],
            causal(rows),
            self.leading_cache,
            stop=max(recorded),
            recorded=recorded,
        )

    def _branch_inputs(self, branches: Sequence[Branches]) -> list[Arguments]:
        """Return the stack's arguments for all branches, which the model embeds without the features."""
        sample = self.sample_ids[self.sample_mask]
        texts = [sample, *(branch.ids.flatten() for branch in branches)]
        call, _ = self._stack_input({"input_ids": torch.cat(texts)[None]})
        sample_embeds, *embeds = call["inputs_embeds"][0].split([len(ids) for ids in texts])
        embeds_with_features = self.call["inputs_embeds"][:, len(self.prefix) :][self.sample_mask]
        if not torch.equal(sample_embeds, embeds_with_features):
            raise CannotShareError("it embeds a text otherwise where there are features")
        calls = []
        positions = self.call["position_ids"]
        for branch, branch_embeds in zip(branches, embeds, strict=True):
            call = self._select_rows(self.prefix[:0])
            of_owner = positions.expand(*positions.shape[:-2], self.batch, -1).index_select(-2, branch.owner)
            rows = (len(self.prefix) + branch.depth).expand(*of_owner.shape[:-1], -1)
            call["position_ids"] = of_owner.gather(-1, rows)
            calls.append(call | {"inputs_embeds": branch_embeds.view(*branch.ids.shape, -1)})
        return calls

    def _branch_text_only(
        self, branch: Branches, call: Arguments, text_cache: DynamicCache, recorded: frozenset[int]
    ) -> RangeOutput:
        """Run branches through the layers that hold text only.

        Args:
            branch: The branches.
            call: The stack's arguments for them.
            text_cache: The cache of the prefix's text in these layers.
            recorded: The layers whose input is recorded; the deepest one is the end of the range.
        """
        if max(recorded) == 0:
            return RangeOutput(call["inputs_embeds"], {}, text_cache)
        past = torch.cat([self.leading, self.rest[self.is_text]])
        rows = len(self.prefix) + branch.depth
        cache = select_cache_rows(text_cache, branch.owner, self.batch)
        return self._run(call, past, rows, branch.visible, cache, stop=max(recorded), recorded=recorded)

    def _prefix_at(self, layer: int, prefix_text: RangeOutput) -> DynamicCache:
        """Return the keys and values of the prefix from insert layer `layer` on."""
        states = None
        if layer in prefix_text.inputs:
            states = torch.zeros_like(self.call["inputs_embeds"][:, : len(self.rest)])
            states[:, self.is_text] = prefix_text.inputs[layer]
        output = self._run(
            self._select_rows(self.rest, with_features=True),
            self.leading,
            self.rest[None],
            causal(self.rest),
            self.leading_cache,
            start=layer,
            states=states,
            replaced=self.is_text,
        )
        return output.cache

    def _select_rows(self, rows: Tensor, with_features: bool = False) -> Arguments:
        """Return the stack's arguments for the positions `rows`, without what is built again.

        `with_features` keeps the arguments that are added to features between layers; then `rows` must hold
        all features.
        """
        call = {name: value for name, value in self.call.items() if name not in REBUILT_ARGUMENTS}
        for name, dim in ROW_DIMENSION.items():
            if isinstance(call.get(name), Tensor):
                call[name] = call[name].index_select(dim, rows)
        if with_features:
            return call
        return {name: value for name, value in call.items() if name not in ADDED_BETWEEN_LAYERS}

    def _run(
        self,
        call: Arguments,
        past: Tensor,
        rows: Tensor,
        visible: Tensor,
        past_cache: DynamicCache,
        *,
        start: int = 0,
        stop: int | None = None,
        recorded: frozenset[int] = frozenset(),
        states: Tensor | None = None,
        replaced: Tensor | None = None,
    ) -> RangeOutput:
        """Run layers `start` to `stop` - 1.

        Args:
            call: The stack's arguments for R rows.
            past: (P,) positions of the keys in `past_cache`, to which all rows attend.
            rows: (B|1, R) positions of the rows.
            visible: (B|1, R, R) bool, the rows that each row attends to.
            past_cache: The keys and values of the rows before; it is not changed.
            start: The first layer.
            stop: The end of the range; None means N.
            recorded: The layers whose input is recorded.
            states: Hidden states that enter layer `start`; None means the input of the stack.
            replaced: (R,) bool, the rows that become `states`; None means all.
        """
        count = rows.shape[1]
        past_visible = visible.new_ones(len(rows), count, len(past))
        keys = torch.cat([past.expand(len(rows), -1), rows], dim=1)
        windows = self.insertion.limits.windows
        mask = mask_of_layers(torch.cat([past_visible, visible], dim=2), rows, keys, windows)
        if replaced is None:
            replaced = visible.new_ones(count)
        layer_range = LayerRange(
            start,
            self.num_layers if stop is None else stop,
            mask,
            states,
            replaced,
            recorded,
            in_tuples=self.in_tuples,
        )
        cache = select_cache_rows(past_cache, None, 0)
        rebuilt = {
            "attention_mask": mask(0, call["inputs_embeds"].dtype),
            cache_name(self.insertion.stack_arguments): cache,
        }
        with self.insertion.within(layer_range):
            output = self.stock(**call, **rebuilt, use_cache=True)
        self.in_tuples = layer_range.in_tuples
        return RangeOutput(output.last_hidden_state, layer_range.inputs, cache)


def causal(rows: Tensor) -> Tensor:
    """Return a causal mask (1, R, R), bool, for rows at ascending positions `rows` (R,)."""
    return (rows[None, :] <= rows[:, None])[None]


def select_cache_rows(cache: DynamicCache, owner: Tensor | None, batch: int) -> DynamicCache:
    """Return a cache for some rows, which grows without changing `cache`.

    Tensors are copied only if several rows are selected, some of them repeatedly.

    Args:
        cache: The cache of `batch` rows.
        owner: (W,) the rows to select; None means all.
        batch: The number of rows in `cache`.
    """
    selected = copy.copy(cache)
    layers: list[Any] = [copy.copy(layer) for layer in cache.layers]
    selected.layers = layers
    if owner is None or (len(owner) == batch and torch.equal(owner, torch.arange(batch).to(owner))):
        return selected
    for layer in layers:
        if layer.is_initialized:
            layer.keys, layer.values = (
                each.expand(len(owner), -1, -1, -1)
                if batch == 1
                else each.index_select(0, owner.to(each.device))
                for each in (layer.keys, layer.values)
            )
    return selected
