"""The parts of a multimodal model, found in any family: encoders, projectors, text model, head."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from backbones.families import find_stack

# Projectors that live inside the encoder, as Qwen2-VL's does.
INNER_PROJECTORS = ("merger", "multi_modal_projector", "projector")


def encoders(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The encoders of the model's modalities by dotted name, such as `model.vision_tower`."""
    found = {}
    names = {module: name for name, module in model.named_modules()}
    for modality in ("image", "audio"):
        encoder = model.get_encoder(modality)
        # The model (or its base) itself is the stock answer where there is none.
        if encoder is not model and encoder is not model.base_model:
            found[names[encoder]] = encoder
    return found


def projectors(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules between encoder and text model by dotted name, such as `model.multi_modal_projector`."""
    found = {}
    known = encoders(model)
    for name, encoder in known.items():
        for part in INNER_PROJECTORS:
            if hasattr(encoder, part):
                found[f"{name}.{part}"] = getattr(encoder, part)
    stack = find_stack(model)
    parent = model.base_model
    names = {module: name for name, module in model.named_modules()}
    for child in parent.children():
        inside = set(child.modules())
        has_others = stack in inside or any(encoder in inside for encoder in known.values())
        if (
            not has_others
            and any(True for _ in child.parameters())
            and child is not model.get_output_embeddings()
        ):
            found[names[child]] = child
    return found


def lora_targets(model: PreTrainedModel) -> str:
    """A pattern of the full names of the text model's linear layers, as PEFT's `target_modules` takes it.

    `lm_head` is not among them: it is no part of the decoder stack. Raises `ValueError` where the text model
    has no `nn.Linear`.
    """
    stack = find_stack(model)
    prefix = next(name for name, module in model.named_modules() if module is stack)
    kinds = sorted(
        {name.rpartition(".")[2] for name, module in stack.named_modules() if isinstance(module, nn.Linear)}
    )
    if not kinds:
        raise ValueError(f"{type(model).__name__} has no nn.Linear in its text model: use --method full")
    return rf"{re.escape(prefix)}\.(.+\.)?({'|'.join(map(re.escape, kinds))})"


def parts(model: PreTrainedModel) -> dict[str, dict[str, nn.Module]]:
    """Modules of each part that `--freeze` knows by name, each by its dotted name."""
    names = {module: name for name, module in model.named_modules()}
    alone = {
        "language": find_stack(model),
        "embeddings": model.get_input_embeddings(),
        "lm_head": model.get_output_embeddings(),
    }
    named = {part: {names[module]: module} for part, module in alone.items() if module in names}
    return {"vision": encoders(model), "projector": projectors(model), **named}


def frozen_modules(model: PreTrainedModel, freeze: Iterable[str]) -> dict[str, nn.Module]:
    """The modules that the names in `freeze` mean, by dotted name: of parts, of modules, or the beginning of
    modules' names. A projector inside an encoder is no part of "vision".

    Raises `ValueError` for a name that is none of these, listing what there is.
    """
    known = parts(model)
    every = dict(model.named_modules())
    kept = {id(module) for projector in projectors(model).values() for module in projector.modules()}
    found: dict[str, nn.Module] = {}
    for name in freeze:
        if name == "vision":
            inside = {f"{top}.{rest}" for top, encoder in known[name].items() for rest in _names(encoder)}
            found |= {inner: every[inner] for inner in inside if _is_apart(every[inner], kept)}
        elif name in known:
            found |= known[name]
        else:
            matches = {inner: module for inner, module in every.items() if inner.startswith(name)}
            if name in matches:  # not also layers.10 for layers.1
                matches = {name: every[name]}
            if not name or not matches:
                modules = ", ".join(inner for inner in every if inner and inner.count(".") <= 1)
                raise ValueError(
                    f"--freeze {name}: the model has no such part; give {', '.join(known)}, or the name or "
                    f"the beginning of the name of a module such as {modules}"
                )
            found |= matches
    return found


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_modules() if name]


def _is_apart(module: nn.Module, kept: set[int]) -> bool:
    """Whether neither the module nor anything in it is kept."""
    return all(id(inner) not in kept for inner in module.modules())
