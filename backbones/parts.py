"""The parts of a multimodal model, found in any family: encoders, projectors, text model, output head."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .families import find_stack

INNER_PROJECTORS = (
    "merger",
    "deepstack_merger_list",
    "patch_merger",
    "multi_modal_projector",
    "projector",
    "connector",
)
"""Names of projectors that live inside the encoder, as Qwen2-VL's does."""

OTHER_ENCODERS = re.compile(r"(tower|vision_model|encoder|vqmodel|^generation_\w+)$")
"""Names of modules beside the text model that are no projectors: encoders, and parts that make images."""


def output_head(model: PreTrainedModel) -> nn.Module | None:
    """Return the module that turns hidden states into logits; None where the model has none."""
    untyped: Any = model
    head: nn.Module | None = untyped.get_output_embeddings()
    return head


def encoders(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return all encoders of the model by dotted name, such as `model.vision_tower`."""
    by_name: dict[str, nn.Module] = {}
    names = {module: name for name, module in model.named_modules()}
    for modality in ("image", "audio"):
        encoder = model.get_encoder(modality)
        # Stock code returns the model (or its base) itself where there is no such encoder.
        if encoder is not model and encoder is not model.base_model:
            by_name[names[encoder]] = encoder
    inner_modules = {inner for encoder in by_name.values() for inner in encoder.modules()}
    for child in modules_beside_text(model):
        is_listed = child in inner_modules or _holds_any(child, by_name.values())
        if not is_listed and OTHER_ENCODERS.search(names[child].rpartition(".")[2]):
            by_name[names[child]] = child
    return by_name


def projectors(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the modules between encoder and text model by dotted name, such as `model.connector`."""
    by_name: dict[str, nn.Module] = {}
    encoders_by_name = encoders(model)
    for name, encoder in encoders_by_name.items():
        for part in INNER_PROJECTORS:
            projector = getattr(encoder, part, nn.Identity())
            if next(projector.parameters(), None) is not None:
                by_name[f"{name}.{part}"] = projector
    names = {module: name for name, module in model.named_modules()}
    for child in modules_beside_text(model):
        if not _holds_any(child, encoders_by_name.values()):
            by_name[names[child]] = child
    return _without_lists(by_name)


def _without_lists(by_name: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Replace each module list by its modules: a list is never called, so PEFT cannot keep a copy of it."""
    flat: dict[str, nn.Module] = {}
    for name, module in by_name.items():
        if isinstance(module, nn.ModuleList):
            flat |= {f"{name}.{index}": item for index, item in enumerate(module)}
        else:
            flat[name] = module
    return flat


def modules_beside_text(model: PreTrainedModel) -> list[nn.Module]:
    """Return the base model's children with weights that are no part of the text model or the head."""
    stack = find_stack(model)
    text_modules = {*stack.modules(), model.get_input_embeddings(), output_head(model)}
    return [
        child
        for name, child in model.base_model.named_children()
        if name != "decoder"  # the text model of an encoder-decoder, whose stack is the encoder
        and next(child.parameters(), None) is not None
        and stack not in set(child.modules())
        and child not in text_modules
    ]


def _holds_any(module: nn.Module, others: Iterable[nn.Module]) -> bool:
    """Whether one of `others` is `module` or lies inside it."""
    inner_modules = set(module.modules())
    return any(other in inner_modules for other in others)


def lora_targets(model: PreTrainedModel) -> str:
    """Return a pattern of the full names of the text model's linear layers, for PEFT's `target_modules`.

    `lm_head` is not among them: it is no part of the decoder stack. Raises `ValueError` if the text model has
    no `nn.Linear`.
    """
    stack = find_stack(model)
    prefix = next(name for name, module in model.named_modules() if module is stack)
    linear = [name for name, module in stack.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"{type(model).__name__} has no nn.Linear in its text model: use --method full")
    # Only numbers are generalised: a layer may hold a linear layer called "0", and have that name too.
    patterns = sorted({re.sub(r"(?<![^.])\d+(?![^.])", r"\\d+", re.escape(name)) for name in linear})
    return rf"{re.escape(prefix)}\.({'|'.join(patterns)})"


def parts(model: PreTrainedModel) -> dict[str, dict[str, nn.Module]]:
    """Return each part that `--freeze` accepts by name, as modules by dotted name."""
    names = {module: name for name, module in model.named_modules()}
    single_modules = {
        "language": find_stack(model),
        "embeddings": model.get_input_embeddings(),
        "lm_head": output_head(model),
    }
    text_parts = {part: {names[module]: module} for part, module in single_modules.items() if module in names}
    return {"vision": encoders(model), "projector": projectors(model), **text_parts}


def frozen_modules(model: PreTrainedModel, freeze: Iterable[str]) -> dict[str, nn.Module]:
    """Return the modules that the names in `freeze` mean, by dotted name.

    A name is that of a part, of a module, or the beginning of modules' names. A projector inside an encoder
    is no part of "vision".

    Raises `ValueError` for a name that is none of these; the message lists what there is.
    """
    model_parts = parts(model)
    frozen: dict[str, nn.Module] = {}
    for name in freeze:
        if name == "vision":
            frozen |= _encoder_modules(model, model_parts["vision"])
        elif name in model_parts:
            frozen |= model_parts[name]
        else:
            frozen |= _modules_named(model, name, model_parts)
    return frozen


def _encoder_modules(model: PreTrainedModel, vision: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the modules inside the encoders that neither are nor hold a part of a projector."""
    in_projectors = {inner for projector in projectors(model).values() for inner in projector.modules()}
    return {
        f"{encoder_name}.{name}": module
        for encoder_name, encoder in vision.items()
        for name, module in encoder.named_modules()
        if name and not in_projectors.intersection(module.modules())
    }


def _modules_named(
    model: PreTrainedModel, name: str, model_parts: dict[str, dict[str, nn.Module]]
) -> dict[str, nn.Module]:
    """Return the module called `name`, or else all whose names begin with it."""
    modules = dict(model.named_modules())
    if name in modules and name:  # an exact name, so that layers.1 does not mean layers.10 too
        return {name: modules[name]}
    matches = {inner: module for inner, module in modules.items() if inner.startswith(name)}
    if not name or not matches:
        examples = ", ".join(inner for inner in modules if inner and inner.count(".") <= 1)
        raise ValueError(
            f"--freeze {name}: the model has no such part; give {', '.join(model_parts)}, or the name or "
            f"the beginning of the name of a module such as {examples}"
        )
    return matches
