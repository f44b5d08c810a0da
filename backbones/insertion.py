"""DeepInsert on an unmodified `transformers` model: below layer L only text rows exist (paper, section 3).

The stock forward computes everything at full length: embeddings, scattered features, positions, masks. Each
decoder layer's call is then given the rows that are alive in it. At layer L the multimodal rows join as they
were when they entered layer 0; after the last layer all rows are put back. No weight, no module and no class
name changes, so `state_dict`, `generate`, Trainer and PEFT see the stock model.
"""

from __future__ import annotations

import copy
import inspect
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .cache import check_can_skip, holds_short_layers, short_layer, shorten
from .families import (
    POSITION_ARGUMENTS,
    UnsupportedModelError,
    base_model_of,
    find_placeholder_owner,
    find_stack,
    is_encoder_decoder,
    placeholder_token_ids,
)
from .forward import Forward
from .rows import Rows, rows_of

CONFIG_KEY = "deepinsert"
_ATTRIBUTE = "_deepinsert"

InsertLayer = int | Sequence[int]


def deep_insert(model: Any, insert_layer: int | None = None) -> Any:
    """Let multimodal tokens skip the first `insert_layer` decoder layers of `model`, in place.

    `insert_layer` is 0 (the stock model) to N (they never enter); None takes the one in `model.config`,
    else 0. It is written to `model.config.deepinsert`, so `save_pretrained` keeps it. Returns `model`, whose
    class, parameters and `state_dict` are unchanged; a PEFT model is changed through its base model.

    Raises `UnsupportedModelError` for models without a decoder stack fed by an encoder's features, and
    `ValueError` for a layer outside 0 to N.
    """
    base = base_model_of(model)
    stack = find_stack(base)
    if insert_layer is None:
        insert_layer = (getattr(base.config, CONFIG_KEY, None) or {}).get("insert_layer", 0)
    insertion = getattr(stack, _ATTRIBUTE, None) or Insertion(base, stack)
    insertion.check([operator.index(insert_layer)])
    if not hasattr(stack, _ATTRIBUTE):
        insertion.install()
    set_insert_layer(base, insert_layer)
    return model


def remove_deep_insert(model: Any) -> Any:
    """Make `model` stock again. Returns it; a model without an insert layer is returned as it is."""
    base = base_model_of(model)
    insertion = getattr(find_stack(base), _ATTRIBUTE, None)
    if insertion is not None:
        insertion.uninstall()
    if hasattr(base.config, CONFIG_KEY):
        delattr(base.config, CONFIG_KEY)
    return model


def set_insert_layer(model: Any, insert_layer: int) -> None:
    """Make `insert_layer` the layer in force, and write it to `model.config`."""
    insertion = _insertion(model)
    layer = operator.index(insert_layer)
    insertion.check([layer])
    insertion.insert_layer = layer
    setattr(base_model_of(model).config, CONFIG_KEY, {"insert_layer": layer})


def insert_layer_of(model: Any) -> int:
    """The insert layer in force outside `insert_at`."""
    return _insertion(model).insert_layer


@contextmanager
def insert_at(
    model: Any, insert_layer: InsertLayer, *, multimodal_mask: Tensor | None = None
) -> Iterator[Any]:
    """Another insert layer for a while, in this thread: an int, or a sequence with one layer per row.

    A row that generation repeats (beams, several samples) takes its layer along. `multimodal_mask` (B, S)
    bool says which positions are multimodal where the model cannot know, as with `inputs_embeds` alone.
    """
    insertion = _insertion(model)
    layers = _layers(insert_layer)
    insertion.check(layers)
    local = insertion.local
    before = (local.layers, local.explicit_mask)
    local.layers, local.explicit_mask = layers, multimodal_mask
    try:
        yield model
    finally:
        local.layers, local.explicit_mask = before


def _layers(insert_layer: Any) -> list[int]:
    try:
        return [operator.index(insert_layer)]
    except TypeError:
        return [operator.index(layer) for layer in insert_layer]


def _insertion(model: Any) -> Insertion:
    insertion = getattr(find_stack(model), _ATTRIBUTE, None)
    if insertion is None:
        raise ValueError(f"{type(model).__name__} has no insert layer yet: call deep_insert(model) first")
    return insertion


class _Local(threading.local):
    """What one thread is doing with the model; a copy of the model starts afresh."""

    def __init__(self) -> None:
        self.layers: list[int] | None = None
        self.explicit_mask: Tensor | None = None
        self.input_ids: Tensor | None = None
        self.embedded: Tensor | None = None
        self.scattered: Tensor | None = None
        self.forward: Forward | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Local:
        return _Local()

    def forget(self) -> None:
        self.input_ids = self.embedded = self.scattered = self.forward = None


class _EmbeddingHook:
    """Hook on the input embeddings. Where they alone are copied, as PEFT does (`modules_to_save`), the copy
    reports to the same insertion; where the model is copied, to the model's own."""

    def __init__(self, insertion: Insertion) -> None:
        self.insertion = insertion

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.insertion.saw_embedding(module, args, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _EmbeddingHook:
        whole = id(self.insertion.entrance) in memo or id(self.insertion.stack) in memo
        return _EmbeddingHook(copy.deepcopy(self.insertion, memo) if whole else self.insertion)


class Insertion:
    """The mechanism on one model: shims on the decoder layers, hooks that see where features go."""

    def __init__(self, model: PreTrainedModel, stack: Any) -> None:
        self.stack = stack
        self.insert_layer = 0
        self.num_layers = len(stack.layers)
        self.layer_arguments = list(inspect.signature(stack.layers[0].forward).parameters)
        self.owner = find_placeholder_owner(model)
        self.causal = not is_encoder_decoder(model)
        self.embedding = model.get_input_embeddings()
        self.entrance = model.base_model
        self.placeholder_ids = sorted(placeholder_token_ids(model.config))
        arguments = inspect.signature(type(stack).forward).parameters
        told = [name for name in POSITION_ARGUMENTS if name in arguments]
        if self.owner is None and not self.placeholder_ids and not told:
            raise UnsupportedModelError(
                f"{type(model).__name__} (model type {model.config.model_type!r}): no placeholder tokens for "
                "images, video or audio were found, so no row of its decoder is known to hold a feature"
            )
        self.local = _Local()
        self.handles: list[Any] = []

    def check(self, layers: Sequence[int]) -> None:
        wrong = [layer for layer in layers if not 0 <= layer <= self.num_layers]
        if wrong or not layers:
            raise ValueError(
                f"insert layer {wrong or list(layers)}: give 0 (stock) to {self.num_layers}, "
                f"the number of decoder layers of this model"
            )

    def install(self) -> None:
        setattr(self.stack, _ATTRIBUTE, self)
        for index, layer in enumerate(self.stack.layers):
            setattr(layer, _ATTRIBUTE, (self, index))
            stock_class: Any = type(layer)
            layer.__class__ = _shimmed(stock_class)
        self.handles = [
            self.embedding.register_forward_hook(_EmbeddingHook(self)),
            self.entrance.register_forward_pre_hook(self.entered, with_kwargs=True),
            self.entrance.register_forward_hook(self.left, always_call=True),
            self.stack.register_forward_pre_hook(self.begin, with_kwargs=True),
            self.stack.register_forward_hook(self.end, always_call=True),
        ]
        if self.owner is not None:
            # A partial of bound methods, unlike a closure, is copied right by copy.deepcopy.
            self.owner.get_placeholder_mask = partial(self.saw_placeholders, self.owner.get_placeholder_mask)

    def uninstall(self) -> None:
        for layer in self.stack.layers:
            layer.__class__ = type(layer)._stock_class
            delattr(layer, _ATTRIBUTE)
        for handle in self.handles:
            handle.remove()
        if self.owner is not None:
            del self.owner.get_placeholder_mask
        delattr(self.stack, _ATTRIBUTE)

    def entered(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Hook before the model: the ids, also where the embeddings in use are not the ones we hooked."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor) and ids.ndim == 2:
            self.local.forget()
            self.local.input_ids = ids

    def left(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Hook after the model, also where it failed before the stack."""
        self.local.forget()

    def saw_embedding(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        """Hook on the input embeddings: a forward starts with them, except inside `get_placeholder_mask`
        and where the stack embeds the ids itself."""
        if self.local.forward is not None:
            return
        if args and args[0].ndim == 2 and getattr(self.stack, _ATTRIBUTE, None) is self:
            self.local.forget()
            self.local.input_ids, self.local.embedded = args[0], output

    def saw_placeholders(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`get_placeholder_mask`, noting where it says that features go: one mask or one a modality."""
        result = stock(*args, **kwargs)
        for mask in result if isinstance(result, tuple) else (result,):
            flat = mask[..., 0] if mask.ndim == 3 else mask
            seen = self.local.scattered
            self.local.scattered = flat if seen is None or seen.shape != flat.shape else seen | flat
        return result

    def begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Hook before the stack: decide which rows are alive in which layers."""
        local = self.local
        local.forward = None
        call = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
        layers = local.layers or [self.insert_layer]
        if max(layers) == 0 and not holds_short_layers(call.get("past_key_values")):
            return
        embeds = call.get("inputs_embeds")
        multimodal = None
        if max(layers) > 0:
            multimodal = self.told_positions(call) if embeds is None else self.multimodal_positions(embeds)
        stages = {} if multimodal is None else self.plan(layers, multimodal, call.get("attention_mask"))
        flash = "flash" in str(self.stack.config._attn_implementation)
        length = (call["input_ids"] if embeds is None else embeds).shape[1]
        local.forward = Forward(length=length, stages=stages, flash=flash, causal=self.causal)

    def end(self, module: nn.Module, args: tuple, output: Any) -> None:
        forward = self.local.forward
        self.local.forget()
        states = getattr(output, "hidden_states", None)
        if forward is not None and states is not None:
            output.hidden_states = tuple(forward.full_length(states))

    def told_positions(self, call: dict[str, Any]) -> Tensor | None:
        """The same for a stack that embeds the ids itself and puts features among them after this hook."""
        ids = call["input_ids"]
        if ids.shape[1] == 1:
            return None
        if self.local.explicit_mask is not None:
            return _for_batch(self.local.explicit_mask, ids)
        past = call.get("past_key_values")
        masks = [call[name] for name in POSITION_ARGUMENTS if call.get(name) is not None]
        if masks and (past is None or past.get_seq_length() == 0):
            return masks[0].to(ids.device, torch.bool)
        if not self.placeholder_ids:
            return None
        return torch.isin(ids, torch.tensor(self.placeholder_ids, device=ids.device))

    def multimodal_positions(self, embeds: Tensor) -> Tensor | None:
        """(B, S) bool of the positions that hold features; None where the forward has none."""
        local = self.local
        if local.explicit_mask is not None and embeds.shape[1] > 1:
            return _for_batch(local.explicit_mask, embeds)
        if local.scattered is not None and local.scattered.shape == embeds.shape[:2]:
            return local.scattered
        if local.embedded is embeds:
            return None
        if local.input_ids is not None and local.input_ids.shape == embeds.shape[:2] and self.placeholder_ids:
            return torch.isin(
                local.input_ids, torch.tensor(self.placeholder_ids, device=local.input_ids.device)
            )
        if local.embedded is not None and local.embedded.shape == embeds.shape:
            return (local.embedded != embeds).any(dim=-1)
        if embeds.shape[1] == 1:
            return None
        raise ValueError(
            "inputs_embeds without input_ids do not say which positions are multimodal: pass them with "
            "insert_at(model, layer, multimodal_mask=mask)"
        )

    def plan(self, layers: list[int], multimodal: Tensor, mask: Any) -> dict[int, Rows | None]:
        """Rows alive from each layer on at which that changes; real padding never enters a short layer."""
        batch, length = multimodal.shape
        if batch % len(layers):
            raise ValueError(
                f"{len(layers)} insert layers for a batch of {batch} rows: give one, or one per row"
            )
        deepest = max(layers)
        per_row = torch.tensor(layers).repeat_interleave(batch // len(layers)).to(multimodal.device)
        real = torch.ones_like(multimodal)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            real = mask[:, -length:].to(device=multimodal.device, dtype=torch.bool)
        stages: dict[int, Rows | None] = {}
        for layer in sorted({0, *layers}):
            if layer == deepest:
                stages[layer] = None
            else:
                waiting = multimodal & (per_row > layer)[:, None]
                stages[layer] = rows_of(real & ~waiting)
        if deepest == self.num_layers:
            del stages[deepest]
        return stages

    def call_layer(self, index: int, stock: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Decoder layer `index`, called with the rows that are alive in it."""
        forward = self.local.forward
        if forward is None:
            return stock(*args, **kwargs)
        cache = kwargs.get("past_key_values")
        short = short_layer(cache, index)
        hidden = forward.enter(index, args[0])
        if forward.rows is None and short is None:
            return stock(hidden, *args[1:], **kwargs)
        # Names, so that a tensor handed over by position is recognised too.
        kwargs = dict(zip(self.layer_arguments[1:], args[1:], strict=False)) | kwargs
        past = 0 if cache is None else cache.get_seq_length(index)
        if forward.rows is not None and cache is not None:
            check_can_skip(cache, index)
        columns, holes = forward.columns(short, past, hidden)
        output = stock(hidden, **forward.select(kwargs, columns, holes))
        if forward.rows is not None:
            if cache is not None and cache.get_seq_length(index) > past:
                shorten(cache, index, columns, past + forward.length, holes)
            if index == self.num_layers - 1:
                return _map_hidden(output, forward.leave)
        return output


def _for_batch(mask: Tensor, embeds: Tensor) -> Tensor:
    """A caller's `multimodal_mask` (B, S) as bool for this forward, whose rows may be repeated (beams)."""
    batch, length = embeds.shape[:2]
    if mask.ndim != 2 or mask.shape[1] != length or batch % mask.shape[0]:
        raise ValueError(
            f"multimodal_mask of shape {tuple(mask.shape)} for inputs of shape {(batch, length)}: give one "
            "row for each row of the batch, one value for each position"
        )
    return mask.to(embeds.device, torch.bool).repeat_interleave(batch // mask.shape[0], dim=0)


def _map_hidden(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A decoder layer's output, a tensor or a tuple that starts with one, with `change` applied to it."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


@cache
def _shimmed(stock_class: type[nn.Module]) -> type[nn.Module]:
    """`stock_class` with a `__call__` that goes through the insertion; same name, no new parameter.

    `__call__` and not a forward hook, so that gradient checkpointing recomputes the layer with the very
    rows that it was given.
    """

    def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        insertion, index = getattr(layer, _ATTRIBUTE)
        return insertion.call_layer(index, partial(stock_class.__call__, layer), args, kwargs)

    members = {"__call__": call, "__module__": stock_class.__module__, "_stock_class": stock_class}
    return type(stock_class.__name__, (stock_class,), members | {"__qualname__": stock_class.__qualname__})
