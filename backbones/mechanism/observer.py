"""Hooks on a model that observe, before its decoder stack is called, where it places features."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deepinsert.backbones.families import find_placeholder_owner, placeholder_methods

from .calls import ATTRIBUTE, Arguments
from .forward_state import ForwardState
from .positions import ObservedPositions


class PositionObserver:
    """Observes a model's token ids, embeddings and placeholder masks in each forward."""

    def __init__(self, model: PreTrainedModel, stack: Any, state: ForwardState) -> None:
        """Observe `model`, whose decoder is `stack`; `state` stores what each thread's forward shows."""
        self.stack = stack
        self.state = state
        self.observed_by_compiled_code = ObservedPositions()
        self.base_model = model.base_model
        self.embedding = model.get_input_embeddings()
        self.placeholder_owner = find_placeholder_owner(model)
        self.handles: list[Any] = []

    def install(self) -> None:
        """Register the hooks, and wrap the methods that return placeholder masks."""
        self.handles = [
            self.embedding.register_forward_hook(EmbeddingHook(self)),
            self.base_model.register_forward_pre_hook(self.before_model, with_kwargs=True),
            self.base_model.register_forward_hook(self.after_model, always_call=True),
        ]
        for name in placeholder_methods(self.placeholder_owner):
            # copy.deepcopy copies a partial of bound methods correctly, but not a closure.
            stock_method = getattr(self.placeholder_owner, name)
            setattr(self.placeholder_owner, name, partial(self.call_placeholder_method, stock_method))

    def uninstall(self) -> None:
        """Undo `install`."""
        for handle in self.handles:
            handle.remove()
        for name in placeholder_methods(self.placeholder_owner):
            delattr(self.placeholder_owner, name)

    @property
    def observed(self) -> ObservedPositions:
        """What the forward in progress has shown."""
        # Dynamo does not support thread-local state. Compiled code runs in one thread after the other.
        return self.observed_by_compiled_code if torch.compiler.is_compiling() else self.state.observed

    @observed.setter
    def observed(self, observed: ObservedPositions) -> None:
        if torch.compiler.is_compiling():
            self.observed_by_compiled_code = observed
        else:
            self.state.observed = observed

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
        """Record the ids in a hook before the model, also if it uses other embeddings than the hooked ones.

        Embeddings that were computed before may be of another prompt; they count only if the model gets them.
        """
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor) and ids.ndim == 2:
            self.observed = ObservedPositions(input_ids=ids, has_model_ids=True)
        elif kwargs.get("inputs_embeds") is not self.observed.embeddings:
            self.observed = ObservedPositions()

    def after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forget what was observed, in a hook after the model that also runs if the model failed."""
        self.observed = ObservedPositions()

    def after_embeddings(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Record embeddings, and their ids if the model itself got none: then a forward starts here.

        A model that got ids may embed others, with padding in place of placeholders (Gemma 4).
        """
        insertion = getattr(self.stack, ATTRIBUTE, None)
        if not args or args[0].ndim != 2 or insertion is None or insertion.observer is not self:
            return
        if not self.observed.has_model_ids:
            self.observed = ObservedPositions(input_ids=args[0])
        if self.observed.embeddings is None:
            self.observed.embeddings = output

    def call_placeholder_method(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a stock `get_placeholder_mask`, and record where it places features."""
        masks = stock(*args, **kwargs)
        self.observed.add_placeholders(masks)
        return masks


class EmbeddingHook:
    """Hook on the input embeddings that reports to an observer.

    PEFT's `modules_to_save` copies the embeddings alone; the copied hook reports to the same observer. If the
    whole model is copied, its hook reports to the copied observer.
    """

    def __init__(self, observer: PositionObserver) -> None:
        """Report to `observer`."""
        self.observer = observer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Report the ids (B, S) in `args` and the embeddings (B, S, D)."""
        self.observer.after_embeddings(module, args, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> EmbeddingHook:
        """Copy the observer only if the model or its stack is being copied."""
        observer = self.observer
        copies_model = id(observer.base_model) in memo or id(observer.stack) in memo
        return EmbeddingHook(copy.deepcopy(observer, memo) if copies_model else observer)
