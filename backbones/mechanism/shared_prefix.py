"""Prompts with features, any number of texts that continue each, at many insert layers: no part twice.

Attention is causal, so what comes first does not depend on what follows. The encoder runs once; the text
before the features, once for all prompts that begin with it; the features' rows, once for each insert layer;
and the texts' rows below an insert layer, which see no feature, once for all of them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from deepinsert.backbones.compat.transformers import CACHE_ARGUMENTS, attention_of, cache_name
from deepinsert.backbones.families import base_model_of, is_encoder_decoder

from .insertion import insertion_of
from .layer_range import Section, mask_maker
from .routing import Insertion

Texts = dict[tuple[int, ...], DynamicCache]
"""Keys and values of the texts that prompts begin with, by their token ids."""

MOST_TEXTS = 16

_ROWS = {"inputs_embeds": -2, "position_ids": -1, "visual_pos_masks": -1}
"""Where the rows are in what a stack is handed."""

_ADDED_LATER = ("visual_pos_masks", "deepstack_visual_embeds")
_REMADE = ("attention_mask", "cache_position", "use_cache", *CACHE_ARGUMENTS)
_GROWING_ROPE = {"dynamic", "longrope"}
"""Rotary positions that change with the prompt's length."""


class CannotShareError(ValueError):
    """A row of the model depends on more than the rows before it; the message says on what."""


@dataclass(frozen=True)
class Branches:
    """Texts that continue prefixes, in W trees of R tokens.

    `owner` (W,) is the prefix that each tree continues. `ids` (W, R) are the tokens, `depth` (W, R) their
    distances from the end of the prefix, from 0 on, and `seen` (W, R, R) bool says which of the others each
    one follows: those on its way, and itself. A tree that has fewer tokens is filled with others that nobody
    sees but themselves.
    """

    owner: Tensor
    ids: Tensor
    depth: Tensor
    seen: Tensor


class Run(NamedTuple):
    """What some layers made of some rows: `states` (B, R, D) behind the last, `kept` inputs, the cache."""

    states: Tensor
    kept: dict[int, Tensor]
    cache: DynamicCache


class _Output(BaseModelOutputWithPast):
    """What a stack returns, with None for all that some stacks return besides."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class SharedPrefix:
    """The rows of B prompts up to their last multimodal token, to be continued by many texts each.

    `inputs` are the model's inputs for such prompts, each with a text after it that is at least as long as
    its deepest branch, padded on the right. The first `length` tokens are the prefix: the same ids in each,
    with other features. `texts` hands what prompts begin with from one call to the next.

    Raises `CannotShareError` for a model whose rows depend on more than the rows before them.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Tensor], length: int, texts: Texts) -> None:
        self.model = base_model_of(model)
        self.insertion: Insertion = insertion_of(model)
        self.num_layers = self.insertion.num_layers
        check_can_share(self.model, self.insertion)
        self.in_tuples = False
        self.call, waiting = self._captured(inputs)
        check_arguments(self.call)
        if waiting is None or not waiting[0, length - 1] or waiting[:, length:].any():
            raise CannotShareError("its prefix does not end with the last multimodal token")
        ids = inputs["input_ids"]
        self.batch, total = ids.shape
        if not (ids[:, :length] == ids[0, :length]).all():
            raise ValueError("prefixes of different tokens: give those that are alike together")
        if self.call.get("position_ids") is None:
            self.call["position_ids"] = torch.arange(total, device=waiting.device)[None]
        self.prefix = torch.arange(length, device=waiting.device)
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        self.sample, self.sampled = ids[:, length:], mask[:, length:].bool()
        begin = int(waiting[0].int().argmax())
        self.ahead, self.rest = self.prefix[:begin], self.prefix[begin:]
        self.is_word = ~waiting[0, begin:length]
        self.ahead_cache = self._text_ahead(ids[0, :begin].tolist(), texts)

    def run(
        self, branches: Sequence[Branches], insert_layers: Sequence[int]
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Final hidden states of each of `branches` at each insert layer: (layer, which, (W, R, D))."""
        keep = frozenset(insert_layers)
        words = self._words_alone(keep)
        calls = self._embedded(branches)
        alone = [self._branch_alone(*each, words.cache, keep) for each in zip(branches, calls, strict=True)]
        for layer in insert_layers:
            if layer == self.num_layers:
                yield from ((layer, index, run.states) for index, run in enumerate(alone))
                continue
            cache = self._prefix_at(layer, words)
            for index, (branch, call) in enumerate(zip(branches, calls, strict=True)):
                own = rows_of(cache, branch.owner, self.batch)
                given = alone[index].kept.get(layer)
                rows = len(self.prefix) + branch.depth
                run = self._run(call, self.prefix, rows, branch.seen, own, layer, states=given)
                yield layer, index, run.states

    def logits(self, states: Tensor) -> Tensor:
        """(R, V) logits of final hidden states (R, D), by the model's own head and all that goes with it."""

        def give(stock: Callable[..., Any], call: dict[str, Any], seen: Any) -> Any:
            return _Output(last_hidden_state=states[None])

        features = self.insertion.placeholder_ids
        word = next(token for token in range(len(features) + 1) if token not in features)
        with self.insertion.driven(give):
            ids = torch.full((1, 1), word, device=states.device)
            return self.model(input_ids=ids, use_cache=False).logits[0]

    def _captured(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Any], Tensor | None]:
        """What the model hands its stack for `inputs`, and (1, S) bool where that holds features."""
        found: list[Any] = []

        def take(stock: Callable[..., Any], call: dict[str, Any], seen: Any) -> Any:
            embeds = call.get("inputs_embeds")
            if embeds is None:
                raise CannotShareError("its decoder stack embeds the tokens itself")
            self.stock = stock
            found.extend([call, seen.multimodal(embeds, self.insertion.placeholder_ids, None)])
            return _Output(last_hidden_state=embeds[:, -1:])

        with self.insertion.driven(take):
            self.model(**inputs, use_cache=False)
        return found[0], found[1]

    def _text_ahead(self, ids: list[int], texts: Texts) -> DynamicCache:
        """Keys and values of the text before the first multimodal token, in every layer."""
        key = tuple(ids)
        if not key:
            return DynamicCache()
        if key not in texts:
            while len(texts) >= MOST_TEXTS:
                del texts[next(iter(texts))]
            call = self._rows_of_call(self.ahead)
            call["inputs_embeds"] = call["inputs_embeds"][:1]
            if call["position_ids"].ndim > 2 or len(call["position_ids"]) > 1:
                call["position_ids"] = call["position_ids"][..., :1, :]
            rows = self.ahead
            texts[key] = self._run(call, rows[:0], rows[None], causal(rows), DynamicCache(), 0).cache
        return rows_of(texts[key], self.prefix.new_zeros(self.batch), 1)

    def _words_alone(self, keep: frozenset[int]) -> Run:
        """Text between multimodal tokens, in layers that hold text only."""
        rows = self.rest[self.is_word]
        if not len(rows):
            return Run(rows[None], {}, self.ahead_cache)
        call = self._rows_of_call(rows)
        return self._run(call, self.ahead, rows[None], causal(rows), self.ahead_cache, 0, max(keep), keep)

    def _embedded(self, branches: Sequence[Branches]) -> list[dict[str, Any]]:
        """The stack's arguments for each of `branches`, which the model embeds without the features."""
        sample = self.sample[self.sampled]
        texts = [sample, *(branch.ids.flatten() for branch in branches)]
        call, _ = self._captured({"input_ids": torch.cat(texts)[None]})
        again, *embeds = call["inputs_embeds"][0].split([len(ids) for ids in texts])
        if not torch.equal(again, self.call["inputs_embeds"][:, len(self.prefix) :][self.sampled]):
            raise CannotShareError("it embeds a text otherwise where there are features")
        calls = []
        positions = self.call["position_ids"]
        for branch, own in zip(branches, embeds, strict=True):
            call = self._rows_of_call(self.prefix[:0])
            of_owner = positions.expand(*positions.shape[:-2], self.batch, -1).index_select(-2, branch.owner)
            rows = (len(self.prefix) + branch.depth).expand(*of_owner.shape[:-1], -1)
            call["position_ids"] = of_owner.gather(-1, rows)
            calls.append(call | {"inputs_embeds": own.view(*branch.ids.shape, -1)})
        return calls

    def _branch_alone(
        self, branch: Branches, call: dict[str, Any], text: DynamicCache, keep: frozenset[int]
    ) -> Run:
        """A branch in layers that hold text only."""
        if max(keep) == 0:
            return Run(call["inputs_embeds"], {}, text)
        past = torch.cat([self.ahead, self.rest[self.is_word]])
        rows = len(self.prefix) + branch.depth
        own = rows_of(text, branch.owner, self.batch)
        return self._run(call, past, rows, branch.seen, own, 0, max(keep), keep)

    def _prefix_at(self, layer: int, words: Run) -> DynamicCache:
        """Keys and values of the prefix from insert layer `layer` on."""
        states = None
        if layer in words.kept:
            states = torch.zeros_like(self.call["inputs_embeds"][:, : len(self.rest)])
            states[:, self.is_word] = words.kept[layer]
        call = self._rows_of_call(self.rest, whole=True)
        rows, placed = self.rest, self.is_word
        run = self._run(
            call, self.ahead, rows[None], causal(rows), self.ahead_cache, layer, states=states, placed=placed
        )
        return run.cache

    def _rows_of_call(self, rows: Tensor, whole: bool = False) -> dict[str, Any]:
        """The stack's arguments for positions `rows`; for the `whole` rest, what is added to features too."""
        call = {name: value for name, value in self.call.items() if name not in _REMADE}
        for name, dim in _ROWS.items():
            if isinstance(call.get(name), Tensor):
                call[name] = call[name].index_select(dim, rows)
        return call if whole else {name: value for name, value in call.items() if name not in _ADDED_LATER}

    def _run(
        self,
        call: dict[str, Any],
        past: Tensor,
        rows: Tensor,
        seen: Tensor,
        cache: DynamicCache,
        start: int,
        stop: int | None = None,
        keep: frozenset[int] = frozenset(),
        states: Tensor | None = None,
        placed: Tensor | None = None,
    ) -> Run:
        """Layers `start` to `stop` - 1 on the rows of `call`, at positions `rows` (B|1, R).

        They see the keys of `cache`, at positions `past` (P,), and of one another what `seen` (B|1, R, R)
        says. At layer `start` they become `states`, all of them or those `placed`.
        """
        count = rows.shape[1]
        earlier = seen.new_ones(len(rows), count, len(past))
        keys = torch.cat([past.expand(len(rows), -1), rows], dim=1)
        mask = mask_maker(torch.cat([earlier, seen], dim=2), rows, keys, self.insertion.windows)
        section = Section(start, self.num_layers if stop is None else stop, mask, states, placed, keep)
        section.in_tuples = self.in_tuples
        if placed is None:
            section.placed = seen.new_ones(count)
        own = rows_of(cache, None, 0)
        given = {
            "attention_mask": mask(0, call["inputs_embeds"].dtype),
            cache_name(self.insertion.stack_arguments): own,
        }
        with self.insertion.running(section):
            output = self.stock(**call, **given, use_cache=True)
        self.in_tuples = section.in_tuples
        return Run(output.last_hidden_state, section.kept, own)


def causal(rows: Tensor) -> Tensor:
    """(1, R, R) bool: each of `rows` (R,) sees those before it, and itself."""
    return (rows[None, :] <= rows[:, None])[None]


def rows_of(cache: DynamicCache, owner: Tensor | None, batch: int) -> DynamicCache:
    """A cache that grows on its own, of rows `owner` (W,) of one of `batch` rows; None means all.

    What it holds is copied only where some rows are wanted more than once beside others.
    """
    own = copy.copy(cache)
    layers: list[Any] = [copy.copy(layer) for layer in cache.layers]
    own.layers = layers
    if owner is None or (len(owner) == batch and torch.equal(owner, torch.arange(batch).to(owner))):
        return own
    for layer in layers:
        if layer.is_initialized:
            layer.keys, layer.values = (
                each.expand(len(owner), -1, -1, -1)
                if batch == 1
                else each.index_select(0, owner.to(each.device))
                for each in (layer.keys, layer.values)
            )
    return own


def check_can_share(model: Any, insertion: Insertion) -> None:
    """Raise `CannotShareError` where a row of the stack may depend on more than the rows before it."""
    stack = insertion.stack
    config = stack.config
    rope = getattr(config, "rope_parameters", None) or {}
    arguments = inspect.signature(type(model).forward).parameters.values()
    needed = [
        each.name
        for each in list(arguments)[1:]
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD and each.name != "input_ids"
    ]
    reasons = {
        "it is an encoder-decoder": is_encoder_decoder(model),
        "its later layers share keys": insertion.deepest < insertion.num_layers,
        "its layers carry a state": any(insertion.recurrent),
        "its attention scales with the number of a row": insertion.farthest is not None,
        "its stack takes no position_ids": "position_ids" not in insertion.stack_arguments,
        "its layers see chunks, or choose their keys": bool(
            set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
        ),
        "its rotary positions change with the prompt's length": rope.get("rope_type") in _GROWING_ROPE,
        f"its attention is {attention_of(config)!r}, which takes no masks of 4 dimensions": (
            attention_of(config) not in ("sdpa", "eager")
        ),
        f"its forward needs {', '.join(needed)} with every text": bool(needed),
        "it is in training mode": model.training,
    }
    for reason, holds in reasons.items():
        if holds:
            raise CannotShareError(reason)


def check_arguments(call: Mapping[str, Any]) -> None:
    """Raise `CannotShareError` where the stack is handed something whose rows are unknown."""
    mask = call.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise CannotShareError("it makes attention masks of its own")
    known = {*_ROWS, *_ADDED_LATER, *_REMADE}
    for name, value in call.items():
        if name not in known and (isinstance(value, Tensor | list | tuple | dict) and len(value)):
            raise CannotShareError(f"its stack is handed {name!r}")
