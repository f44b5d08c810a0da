"""The parts of a multimodal model, found in any family: encoders, projectors, text model, head."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from .families import find_stack

# Projectors that live inside the encoder, as Qwen2-VL's does.
INNER_PROJECTORS = (
    "merger",
    "deepstack_merger_list",
    "patch_merger",
    "multi_modal_projector",
    "projector",
    "connector",
)
# What stands beside the text model and is no projector: more encoders, and what makes images.
OTHER_ENCODERS = re.compile(r"(tower|vision_model|encoder|vqmodel|^generation_\w+)$")


def encoders(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The encoders of the model's modalities by dotted name, such as `model.vision_tower`, with any more that
    stand beside them."""
    found = {}
    names = {module: name for name, module in model.named_modules()}
    for modality in ("image", "audio"):
        encoder = model.get_encoder(modality)
        # The model (or its base) itself is the stock answer where there is none.
        if encoder is not model and encoder is not model.base_model:
            found[names[encoder]] = encoder
    inside = {inner for encoder in found.values() for inner in encoder.modules()}
    for child in beside_text(model):
        is_known = child in inside or any(encoder in set(child.modules()) for encoder in found.values())
        if not is_known and OTHER_ENCODERS.search(names[child].rpartition(".")[2]):
            found[names[child]] = child
    return found


def beside_text(model: PreTrainedModel) -> list[nn.Module]:
    """Children of the base model that have weights and are no part of the text model or the head."""
    stack = find_stack(model)
    text = {*stack.modules(), model.get_input_embeddings(), model.get_output_embeddings()}
    return [
        child
        for name, child in model.base_model.named_children()
        if name != "decoder"  # of a text model whose encoder multimodal tokens enter
        and next(child.parameters(), None) is not None
        and stack not in set(child.modules())
        and child not in text
    ]


def projectors(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules between encoder and text model by dotted name, such as `model.multi_modal_projector`."""
    found = {}
    known = encoders(model)
    for name, encoder in known.items():
        for part in INNER_PROJECTORS:
            if next(getattr(encoder, part, nn.Identity()).parameters(), None) is not None:
                found[f"{name}.{part}"] = getattr(encoder, part)
    names = {module: name for name, module in model.named_modules()}
    for child in beside_text(model):
        if not any(encoder in set(child.modules()) for encoder in known.values()):
            found[names[child]] = child
    # Lists are not called, so that PEFT cannot keep a copy of one: their modules stand for them.
    apart: dict[str, nn.Module] = {}
    for name, module in found.items():
        listed = isinstance(module, nn.ModuleList)
        apart |= {f"{name}.{at}": one for at, one in enumerate(module)} if listed else {name: module}
    return apart


def lora_targets(model: PreTrainedModel) -> str:
    """A pattern of the full names of the text model's linear layers, as PEFT's `target_modules` takes it.

    `lm_head` is not among them: it is no part of the decoder stack. Raises `ValueError` where the text model
    has no `nn.Linear`.
    """
    stack = find_stack(model)
    prefix = next(name for name, module in model.named_modules() if module is stack)
    linear = [name for name, module in stack.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"{type(model).__name__} has no nn.Linear in its text model: use --method full")
    # Whole names but for numbers: a layer may hold a linear layer called "0", and is called so itself.
    kinds = sorted({re.sub(r"(?<![^.])\d+(?![^.])", r"\\d+", re.escape(name)) for name in linear})
    return rf"{re.escape(prefix)}\.({'|'.join(kinds)})"


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
