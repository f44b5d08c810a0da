"""What `deep_insert` installs on a model: calls around its decoder stack and layers, hooks before them.

The hooks see where features go; the stack's call plans which rows are alive in which layers; each layer's
call is given those rows. Calls are replaced by giving a module a subclass of its class with the same name: a
hook would run again when gradient checkpointing recomputes a layer, the outer `__call__` does not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deepinsert.backbones.compat.transformers import attention_of, cache_in, cache_name
from deepinsert.backbones.errors import UnsupportedModelError
from deepinsert.backbones.families import (
    deepest_insert_layer,
    farthest_position,
    find_placeholder_owner,
    is_encoder_decoder,
    is_recurrent,
    placeholder_methods,
    placeholder_token_ids,
    window_of,
)
from deepinsert.backbones.refusals import check_call

from .cache import LayerKeys, check_can_continue, holds_short_layers, is_short_static, sees_all
from .calls import (
    ATTRIBUTE,
    EmbeddingHook,
    called_through,
    map_hidden,
    on_static_cache,
    one_per_row,
    outside_the_graph,
)
from .forward import Forward
from .forward_state import OVERRIDES, Driver, Override, Progress
from .grouping import can_group, in_groups
from .layer_range import Section
from .positions import POSITION_ARGUMENTS, Sightings, real_positions, told_positions
from .rows import Rows, rows_of


class Insertion:
    """The mechanism on one model."""

    def __init__(self, model: PreTrainedModel, stack: Any) -> None:
        self.stack = stack
        self.insert_layer = 0
        self.num_layers = len(stack.layers)
        self.deepest = deepest_insert_layer(stack)
        self.farthest = farthest_position(stack)
        self.stack_arguments = list(inspect.signature(stack.forward).parameters)
        self.layer_arguments = list(inspect.signature(stack.layers[0].forward).parameters)
        self.recurrent = [is_recurrent(stack, index) for index in range(self.num_layers)]
        self.windows = [window_of(stack, index) for index in range(self.num_layers)]
        self.owner = find_placeholder_owner(model)
        self.causal = not is_encoder_decoder(model)
        self.embedding = model.get_input_embeddings()
        self.entrance = model.base_model
        self.placeholder_ids = sorted(placeholder_token_ids(model.config))
        self.told = bool(set(POSITION_ARGUMENTS) & set(self.stack_arguments))
        self.progress = Progress()
        self.compiled_seen = Sightings()
        self.overrides = 0
        """How many `insert_at` are open: what compiled code can know of them."""
        self.handles: list[Any] = []

    def check(self, layers: Sequence[int]) -> None:
        wrong = [layer for layer in layers if not 0 <= layer <= self.deepest]
        if wrong or not layers:
            limit = (
                "the number of decoder layers of this model"
                if self.deepest == self.num_layers
                else f"the first of its {self.num_layers} decoder layers whose keys later layers share"
            )
            raise ValueError(
                f"insert layer {wrong or list(layers)}: give 0 (stock) to {self.deepest}, {limit}"
            )

    def check_window(self, index: int, keys: LayerKeys) -> None:
        """FlashAttention measures a window in the rows it is given. One new row that its cache keeps a window
        for is given no other."""
        window, total = self.windows[index], keys.past + keys.length
        if window is None or total <= window or (keys.length == 1 and keys.windowed):
            return
        raise UnsupportedModelError(
            f"{attention_of(self.stack.config)!r} measures the window of {window} positions of layer "
            f"{index} in rows, which are fewer than the {total} positions: call "
            'model.set_attn_implementation("sdpa"), or insert at layer 0'
        )

    def install(self) -> None:
        setattr(self.stack, ATTRIBUTE, self)
        kind: Any = type(self.stack)
        self.stack.__class__ = called_through(kind, "call_stack")
        for index, layer in enumerate(self.stack.layers):
            setattr(layer, ATTRIBUTE, (self, (index,)))
            kind = type(layer)
            layer.__class__ = called_through(kind, "call_layer")
        self.handles = [
            self.embedding.register_forward_hook(EmbeddingHook(self)),
            self.entrance.register_forward_pre_hook(self.entered, with_kwargs=True),
            self.entrance.register_forward_hook(self.left, always_call=True),
        ]
        for name in placeholder_methods(self.owner):
            # A partial of bound methods, unlike a closure, is copied right by copy.deepcopy.
            setattr(self.owner, name, partial(self.saw_placeholders, getattr(self.owner, name)))

    def uninstall(self) -> None:
        for module in (self.stack, *self.stack.layers):
            module.__class__ = type(module)._stock_class
            delattr(module, ATTRIBUTE)
        for handle in self.handles:
            handle.remove()
        for name in placeholder_methods(self.owner):
            delattr(self.owner, name)

    @contextmanager
    def overridden(self, override: Override) -> Iterator[None]:
        token = OVERRIDES.set(OVERRIDES.get() | {id(self): override})
        self.overrides += 1
        try:
            yield
        finally:
            self.overrides -= 1
            OVERRIDES.reset(token)

    @contextmanager
    def driven(self, driver: Driver) -> Iterator[None]:
        """`driver` is called in place of the stack, in this thread."""
        outer, self.progress.driver = self.progress.driver, driver
        try:
            yield
        finally:
            self.progress.driver = outer

    @contextmanager
    def running(self, section: Section) -> Iterator[None]:
        """The layers go through `section`, in this thread."""
        outer, self.progress.section = self.progress.section, section
        try:
            yield
        finally:
            self.progress.section = outer

    @property
    def override(self) -> Override | None:
        return OVERRIDES.get().get(id(self))

    @property
    def layers(self) -> tuple[int, ...]:
        """The insert layers in force: one, or one for each row."""
        override = self.override
        return (self.insert_layer,) if override is None else override.layers

    @property
    def seen(self) -> Sightings:
        # Dynamo does not know thread-local state; what it traces is run by one thread after the other.
        return self.compiled_seen if torch.compiler.is_compiling() else self.progress.seen

    @seen.setter
    def seen(self, seen: Sightings) -> None:
        if torch.compiler.is_compiling():
            self.compiled_seen = seen
        else:
            self.progress.seen = seen

    def entered(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Hook before the model: the ids, also where the embeddings in use are not the ones we hooked.

        What was embedded before may be another prompt, unless it is what the model is given.
        """
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor) and ids.ndim == 2:
            self.seen = Sightings(input_ids=ids, entered=True)
        elif kwargs.get("inputs_embeds") is not self.seen.embedded:
            self.seen = Sightings()

    def left(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Hook after the model, also where it failed before the stack."""
        self.seen = Sightings()

    def saw_embedding(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        """Hook on the input embeddings: a forward starts with them, unless the model was given the ids.

        A model may then embed others, with padding in the place of its placeholders (Gemma 4).
        """
        if not args or args[0].ndim != 2 or getattr(self.stack, ATTRIBUTE, None) is not self:
            return
        if not self.seen.entered:
            self.seen = Sightings(input_ids=args[0])
        if self.seen.embedded is None:
            self.seen.embedded = output

    def saw_placeholders(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A `get_placeholder_mask`, noting where it says that features go."""
        result = stock(*args, **kwargs)
        self.seen.see_placeholders(result)
        return result

    def call_stack(self, stock: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The decoder stack. Compiled code runs stock forwards and decoding with a static cache; the rest of
        what it meets leaves the graph."""
        if not torch.compiler.is_compiling():
            return self.plan_and_run(stock, args, kwargs, self.progress.seen)
        call = self.bind(args, kwargs)
        past = cache_in(call)
        untouched = self.insert_layer == 0 and not self.overrides and not holds_short_layers(past)
        if untouched or self.decodes_statically(call, past):
            return stock(*args, **kwargs)
        return outside_the_graph(self.plan_and_run, stock, args, kwargs, self.compiled_seen)

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The stack's arguments by name."""
        return dict(zip(self.stack_arguments, args, strict=False)) | kwargs

    def decodes_statically(self, call: dict[str, Any], past: Any) -> bool:
        """Whether this is one token on static caches, which the layers' calls alone can do."""
        given = call.get("inputs_embeds")
        if given is None:
            given = call.get("input_ids")
        return given is not None and given.shape[1] == 1 and past is not None and past.is_compileable

    def plan_and_run(
        self, stock: Callable[..., Any], args: tuple, kwargs: dict[str, Any], seen: Sightings
    ) -> Any:
        """Plan the stages, then call the stack, once or once for each group of rows."""
        progress, layers = self.progress, self.layers
        call = self.bind(args, kwargs)
        progress.seen, progress.depth = Sightings(), progress.depth + 1
        try:
            if progress.driver is not None:
                return progress.driver(stock, call, seen)
            if max(layers) == 0 and not holds_short_layers(cache_in(call)):
                return stock(*args, **kwargs)
            embeds = call.get("inputs_embeds")
            if embeds is None:
                per_row = one_per_row(layers, call["input_ids"].shape[0])
                return self.run(stock, per_row, None, call, partial(self.plan_inside, per_row, call))
            multimodal = self.multimodal(seen, embeds)
            if multimodal is not None:
                check_call(self.stack, call)
            per_row = one_per_row(layers, embeds.shape[0])
            if multimodal is not None and can_group(self.stack, per_row, call):
                return in_groups(partial(self.run, stock), per_row, multimodal, call)
            return self.run(stock, per_row, multimodal, call)
        finally:
            # A stack that embeds ids itself has been seen to do so: of no concern to the next forward.
            progress.seen, progress.depth = Sightings(), progress.depth - 1

    def multimodal(self, seen: Sightings, embeds: Tensor) -> Tensor | None:
        """(B, S) bool of the positions that wait; None where there are none."""
        if max(self.layers) == 0:
            return None
        return seen.multimodal(
            embeds, self.placeholder_ids, self.override.multimodal if self.override else None
        )

    def plan_inside(
        self, layers: Sequence[int], call: dict[str, Any], embeds: Tensor
    ) -> dict[int, Rows | None]:
        """The stages where the stack itself embeds the ids, and may scatter features (Chameleon): its first
        layer's input `embeds` is the first that can tell."""
        seen = self.progress.seen
        if self.told:
            seen = Sightings(scattered=told_positions(call), embedded=embeds)
        multimodal = self.multimodal(seen, embeds)
        return {} if multimodal is None else self.plan(layers, multimodal, call)

    def run(
        self,
        stock: Callable[..., Any],
        layers: Sequence[int],
        multimodal: Tensor | None,
        call: dict[str, Any],
        plan: Callable[[Tensor], dict[int, Rows | None]] | None = None,
    ) -> Any:
        """One call of the stock stack; `layers` has one insert layer for each of its rows."""
        embeds = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]
        forward = Forward(
            length=embeds.shape[1],
            stages={} if multimodal is None else self.plan(layers, multimodal, call),
            causal=self.causal,
            flash="flash" in attention_of(self.stack.config),
            between=any(name.startswith("deepstack") and call[name] is not None for name in call),
            plan=plan,
        )
        outer, self.progress.forward = self.progress.forward, forward
        try:
            output = stock(**call)
        finally:
            self.progress.forward = outer
        states = getattr(output, "hidden_states", None)
        if states is not None:
            output.hidden_states = tuple(forward.full_length(states))
        return output

    def plan(self, layers: Sequence[int], multimodal: Tensor, call: dict[str, Any]) -> dict[int, Rows | None]:
        """Rows alive from each layer on at which that changes; real padding never enters a short layer."""
        deepest = max(layers)
        per_row = torch.tensor(layers, device=multimodal.device)
        past = cache_in(call)
        seen = 0 if past is None else int(past.get_seq_length())
        real = real_positions(call.get("attention_mask"), multimodal, seen)
        stages: dict[int, Rows | None] = {}
        for layer in sorted({0, *layers}):
            if layer == deepest:
                stages[layer] = None
            else:
                waiting = multimodal & (per_row > layer)[:, None]
                rows = rows_of(real & ~waiting)
                everything = not rows.ragged and rows.count == rows.length
                stages[layer] = None if everything else rows
        if deepest == self.num_layers:
            del stages[deepest]
        return stages

    def call_layer(self, index: int, stock: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Decoder layer `index`, called with the rows that are alive in it."""
        compiling = torch.compiler.is_compiling()
        forward = None if compiling else self.progress.forward
        if not compiling and self.progress.section is not None:
            call = dict(zip(self.layer_arguments, args, strict=False)) | kwargs
            return self.progress.section.call(index, stock, self.layer_arguments[0], call)
        if forward is None and not compiling:
            if self.progress.depth == 0 and max(self.layers) > 0:
                raise UnsupportedModelError(
                    "a decoder layer was called by itself, outside of its stack: an insert layer needs the "
                    "whole model's forward; insert at layer 0, or call the model"
                )
            return stock(*args, **kwargs)
        # Names, so that a tensor handed over by position is recognised too.
        call = dict(zip(self.layer_arguments, args, strict=False)) | kwargs
        past = cache_in(call)
        if forward is None or (forward.whole_at(index) and is_short_static(past, index)):
            if forward is not None:
                # Rows may join here: an earlier turn on this cache had them wait longer.
                first = self.layer_arguments[0]
                call[first] = forward.enter(index, call[first])
            return on_static_cache(index, stock, call, 1 if forward is None else forward.length)
        if forward.decodes and not forward.flash and sees_all(past, index, call.get("attention_mask")):
            return stock(*args, **kwargs)
        return self.call_with_rows(index, stock, call, past, forward)

    def call_with_rows(
        self, index: int, stock: Callable[..., Any], call: dict[str, Any], past: Any, forward: Forward
    ) -> Any:
        hidden = forward.enter(index, call.pop(self.layer_arguments[0]))
        keys = LayerKeys(past, index, forward.length)
        if forward.flash and (forward.rows is not None or keys.short):
            self.check_window(index, keys)
        if forward.rows is None and not keys.needs_mask(call.get("attention_mask")):
            return stock(hidden, **call)
        if forward.rows is not None:
            self.check_can_leave_out(index, call, keys, forward.rows)
            if self.recurrent[index] and forward.rows.empty:
                # The dummies' state is nobody's.
                call[cache_name(call)] = None
        columns = forward.columns(keys, hidden)
        output = stock(hidden, **forward.select(call, columns, self.recurrent[index]))
        if forward.rows is None:
            return output
        keys.record(forward.keymap(columns, keys.past), hidden.shape[-2])
        if forward.between or index == self.num_layers - 1:
            return map_hidden(output, forward.put_back)
        return output

    def check_can_leave_out(self, index: int, call: dict[str, Any], keys: LayerKeys, rows: Rows) -> None:
        """Raise where layer `index` or its cache cannot be given some rows only."""
        keys.check_can_skip(call.get("attention_mask"))
        if self.recurrent[index] and rows.ragged and not rows.empty:
            check_can_continue(cache_in(call), index)
        end = keys.past + keys.length
        if self.farthest is not None and end > self.farthest:
            raise UnsupportedModelError(
                f"a prompt of {end} positions: this model scales attention by the number of a row from "
                f"{self.farthest + 1} on, which a layer without all rows gets wrong; insert at layer 0"
            )
