"""Installs DeepInsert on one model and routes its stack and layer calls.

Hooks before the stack observe where features are placed. The stack's call plans which rows are alive in which
layers, and each layer's call gets these rows. Calls are replaced by giving a module a subclass of its class
with the same name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deepinsert.backbones.compat.transformers import attention_of, cache_in, cache_name
from deepinsert.backbones.errors import UnsupportedModelError
from deepinsert.backbones.families import is_encoder_decoder, placeholder_token_ids
from deepinsert.backbones.refusals import check_call

from .cache import LayerKeys, holds_short_layers, is_short_static, sees_all_keys
from .calls import (
    ATTRIBUTE,
    Arguments,
    StockCall,
    call_on_static_cache,
    call_outside_graph,
    class_with_call,
    map_hidden,
    one_per_row,
)
from .forward import Forward
from .forward_state import ACTIVE_OVERRIDES, ForwardState, Override, StackReplacement
from .grouping import can_group, run_in_groups
from .layer_limits import LayerLimits
from .layer_range import LayerRange
from .observer import PositionObserver
from .positions import POSITION_ARGUMENTS, ObservedPositions, positions_in_call, real_positions
from .rows import Stages, plan_stages


class Insertion:
    """What `deep_insert` installs on one model.

    Attributes:
        insert_layer: The permanent insert layer; `insert_at` overrides it.
        limits: What the decoder layers allow.
        placeholder_ids: The token ids that stand for multimodal tokens.
        state: The state of each thread's forward.
        observer: The hooks that observe where features are placed.
    """

    def __init__(self, model: PreTrainedModel, stack: Any) -> None:
        """Read what is needed from `model` and its decoder `stack`; `install` changes them."""
        self.stack = stack
        self.insert_layer = 0
        self.limits = LayerLimits.of(stack)
        self.stack_arguments = list(inspect.signature(stack.forward).parameters)
        self.layer_arguments = list(inspect.signature(stack.layers[0].forward).parameters)
        self.causal = not is_encoder_decoder(model)
        self.placeholder_ids = sorted(placeholder_token_ids(model.config))
        self.stack_takes_positions = bool(set(POSITION_ARGUMENTS) & set(self.stack_arguments))
        self.state = ForwardState()
        self.observer = PositionObserver(model, stack, self.state)
        self.open_overrides = 0  # compiled code can read this number, but not the overrides

    def install(self) -> None:
        """Replace the calls of the stack and its layers, and register the hooks."""
        setattr(self.stack, ATTRIBUTE, self)
        stock_class: Any = type(self.stack)
        self.stack.__class__ = class_with_call(stock_class, "call_stack")
        for index, layer in enumerate(self.stack.layers):
            setattr(layer, ATTRIBUTE, (self, (index,)))
            stock_class = type(layer)
            layer.__class__ = class_with_call(stock_class, "call_layer")
        self.observer.install()

    def uninstall(self) -> None:
        """Undo `install`: afterwards the model is stock."""
        for module in (self.stack, *self.stack.layers):
            module.__class__ = type(module)._stock_class
            delattr(module, ATTRIBUTE)
        self.observer.uninstall()

    @contextmanager
    def overridden(self, override: Override) -> Iterator[None]:
        """Use the insert layers of `override` inside this block, in the current thread or task only."""
        token = ACTIVE_OVERRIDES.set(ACTIVE_OVERRIDES.get() | {id(self): override})
        self.open_overrides += 1
        try:
            yield
        finally:
            self.open_overrides -= 1
            ACTIVE_OVERRIDES.reset(token)

    @contextmanager
    def stack_replaced(self, replacement: StackReplacement) -> Iterator[None]:
        """Call `replacement` in place of the stack inside this block, in the current thread only."""
        outer, self.state.replacement = self.state.replacement, replacement
        try:
            yield
        finally:
            self.state.replacement = outer

    @contextmanager
    def within(self, layer_range: LayerRange) -> Iterator[None]:
        """Run the layers through `layer_range` inside this block, in the current thread only."""
        outer, self.state.layer_range = self.state.layer_range, layer_range
        try:
            yield
        finally:
            self.state.layer_range = outer

    @property
    def override(self) -> Override | None:
        """The active override of this thread or task."""
        return ACTIVE_OVERRIDES.get().get(id(self))

    @property
    def layers(self) -> tuple[int, ...]:
        """The insert layers in force: one, or one per row."""
        override = self.override
        return (self.insert_layer,) if override is None else override.layers

    def call_stack(self, stock: StockCall, args: tuple[Any, ...], kwargs: Arguments) -> Any:
        """Run the decoder stack.

        Compiled code runs stock forwards and decoding with a static cache; everything else leaves the graph.
        """
        if not torch.compiler.is_compiling():
            return self.plan_and_run(stock, args, kwargs, self.state.observed)
        call = self.bind(args, kwargs)
        past = cache_in(call)
        is_stock = self.insert_layer == 0 and not self.open_overrides and not holds_short_layers(past)
        if is_stock or self.decodes_statically(call, past):
            return stock(*args, **kwargs)
        observed = self.observer.observed_by_compiled_code
        return call_outside_graph(self.plan_and_run, stock, args, kwargs, observed)

    def bind(self, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
        """Return the stack's arguments by name."""
        return dict(zip(self.stack_arguments, args, strict=False)) | kwargs

    def decodes_statically(self, call: Arguments, past: Any) -> bool:
        """Whether this is one token on static caches, for which the layers' calls alone suffice."""
        tokens = call.get("inputs_embeds")
        if tokens is None:
            tokens = call.get("input_ids")
        return tokens is not None and tokens.shape[1] == 1 and past is not None and past.is_compileable

    def plan_and_run(
        self, stock: StockCall, args: tuple[Any, ...], kwargs: Arguments, observed: ObservedPositions
    ) -> Any:
        """Plan the stages, then call the stack, once or once per group of rows.

        Args:
            stock: The stack's stock call.
            args: Its positional arguments.
            kwargs: Its named arguments.
            observed: What the forward has shown about its positions.
        """
        state, layers = self.state, self.layers
        call = self.bind(args, kwargs)
        state.observed, state.open_stack_calls = ObservedPositions(), state.open_stack_calls + 1
        try:
            if state.replacement is not None:
                return state.replacement(stock, call, observed)
            if max(layers) == 0 and not holds_short_layers(cache_in(call)):
                return stock(*args, **kwargs)
            embeds = call.get("inputs_embeds")
            if embeds is None:
                per_row = one_per_row(layers, call["input_ids"].shape[0])
                return self.run(stock, per_row, None, call, partial(self.plan_inside, per_row, call))
            multimodal = self.multimodal_positions(observed, embeds)
            if multimodal is not None:
                check_call(self.stack, call)
            per_row = one_per_row(layers, embeds.shape[0])
            if multimodal is not None and can_group(self.stack, per_row, call):
                return run_in_groups(partial(self.run, stock), per_row, multimodal, call)
            return self.run(stock, per_row, multimodal, call)
        finally:
            # A stack that embeds ids itself was observed doing so; the next forward must not see this.
            state.observed, state.open_stack_calls = ObservedPositions(), state.open_stack_calls - 1

    def multimodal_positions(self, observed: ObservedPositions, embeds: Tensor) -> Tensor | None:
        """Return the (B, S) bool positions that wait; None if there are none."""
        if max(self.layers) == 0:
            return None
        explicit = self.override.multimodal if self.override else None
        return observed.multimodal(embeds, self.placeholder_ids, explicit)

    def plan_inside(self, layers: Sequence[int], call: Arguments, embeds: Tensor) -> Stages:
        """Plan the stages if the stack itself embeds the ids, and may place features (Chameleon).

        Then the input `embeds` (B, S, D) of its first layer is the first tensor that shows the features.
        """
        observed = self.state.observed
        if self.stack_takes_positions:
            observed = ObservedPositions(placeholders=positions_in_call(call), embeddings=embeds)
        multimodal = self.multimodal_positions(observed, embeds)
        return {} if multimodal is None else self.plan(layers, multimodal, call)

    def plan(self, layers: Sequence[int], multimodal: Tensor, call: Arguments) -> Stages:
        """Plan the stages of a call of the stack, with the insert layer of each row."""
        past = cache_in(call)
        past_length = 0 if past is None else int(past.get_seq_length())
        real = real_positions(call.get("attention_mask"), multimodal, past_length)
        return plan_stages(layers, multimodal, real, self.limits.num_layers)

    def run(
        self,
        stock: StockCall,
        layers: Sequence[int],
        multimodal: Tensor | None,
        call: Arguments,
        plan: Callable[[Tensor], Stages] | None = None,
    ) -> Any:
        """Call the stock stack once, with the rows that are alive in each layer.

        Args:
            stock: The stack's stock call.
            layers: The insert layer of each row.
            multimodal: (B, S) bool, the multimodal positions; None if there are none, or for `plan` to find.
            call: The stack's arguments by name.
            plan: Makes the stages from the input of layer 0.
        """
        embeds = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]
        forward = Forward(
            length=embeds.shape[1],
            stages={} if multimodal is None else self.plan(layers, multimodal, call),
            causal=self.causal,
            flash="flash" in attention_of(self.stack.config),
            adds_between_layers=any(name.startswith("deepstack") and call[name] is not None for name in call),
            plan=plan,
        )
        outer, self.state.forward = self.state.forward, forward
        try:
            output = stock(**call)
        finally:
            self.state.forward = outer
        states = getattr(output, "hidden_states", None)
        if states is not None:
            output.hidden_states = tuple(forward.full_length(states))
        return output

    def call_layer(self, index: int, stock: StockCall, args: tuple[Any, ...], kwargs: Arguments) -> Any:
        """Run decoder layer `index` with the rows that are alive in it.

        Args:
            index: The layer.
            stock: Its stock call.
            args: Its positional arguments.
            kwargs: Its named arguments.
        """
        compiling = torch.compiler.is_compiling()
        forward = None if compiling else self.state.forward
        if not compiling and self.state.layer_range is not None:
            call = dict(zip(self.layer_arguments, args, strict=False)) | kwargs
            return self.state.layer_range.call(index, stock, self.layer_arguments[0], call)
        if forward is None and not compiling:
            if self.state.open_stack_calls == 0 and max(self.layers) > 0:
                raise UnsupportedModelError(
                    "a decoder layer was called by itself, outside of its stack: an insert layer needs the "
                    "whole model's forward; insert at layer 0, or call the model"
                )
            return stock(*args, **kwargs)
        # By name, so that a tensor that was passed by position is recognised too.
        call = dict(zip(self.layer_arguments, args, strict=False)) | kwargs
        past = cache_in(call)
        if forward is None or (forward.has_all_rows(index) and is_short_static(past, index)):
            if forward is not None:
                # Rows may join here, if an earlier turn on this cache had a deeper insert layer.
                hidden_name = self.layer_arguments[0]
                call[hidden_name] = forward.enter(index, call[hidden_name])
            return call_on_static_cache(index, stock, call, 1 if forward is None else forward.length)
        if forward.decodes and not forward.flash and sees_all_keys(past, index, call.get("attention_mask")):
            return stock(*args, **kwargs)
        return self.call_with_rows(index, stock, call, past, forward)

    def call_with_rows(
        self, index: int, stock: StockCall, call: Arguments, past: Any, forward: Forward
    ) -> Any:
        """Run a layer on the alive rows, and record in its cache where their keys are.

        Args:
            index: The layer.
            stock: Its stock call.
            call: Its arguments by name.
            past: The KV cache, or None.
            forward: The forward in progress.
        """
        hidden = forward.enter(index, call.pop(self.layer_arguments[0]))
        keys = LayerKeys(past, index, forward.length)
        if forward.flash and (forward.rows is not None or keys.short):
            self.limits.check_window(index, keys, attention_of(self.stack.config))
        if forward.rows is None and not keys.needs_mask(call.get("attention_mask")):
            return stock(hidden, **call)
        is_recurrent = self.limits.recurrent[index]
        if forward.rows is not None:
            self.limits.check_can_leave_out(index, call, keys, forward.rows)
            if is_recurrent and forward.rows.empty:
                # All rows are dummies, whose state must not be stored.
                call[cache_name(call)] = None
        columns = forward.columns(keys, hidden)
        output = stock(hidden, **forward.select(call, columns, is_recurrent))
        if forward.rows is None:
            return output
        keys.record(forward.keymap(columns, keys.past), hidden.shape[-2])
        if forward.adds_between_layers or index == self.limits.num_layers - 1:
            return map_hidden(output, forward.put_back)
        return output
