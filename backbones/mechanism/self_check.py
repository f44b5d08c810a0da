"""A self-check of the mechanism under versions of transformers and torch that were not tested before.

A LLaVA of a few thousand weights is compared with itself: stock, with multimodal tokens masked, with and
without a cache, alone and in a batch. Combinations of versions that pass are recorded in a file.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepinsert.backbones.compat.versions import installed, is_tried, tried_range
from deepinsert.backbones.errors import UntriedVersionError
from deepinsert.backbones.families import find_stack

from .calls import ATTRIBUTE, map_hidden
from .forward_state import Override
from .routing import Insertion

SWITCH = "DEEPINSERT_SELF_CHECK"
"""The environment variable that switches the self-check off if it is 0."""

IMAGE, IMAGE_TOKENS, WORDS = 5, 4, 32
"""The image token's id, the number of image tokens, and the size of the vocabulary."""

LAYERS, INSERT_LAYER = 3, 2
TOLERANCE = 1e-4
"""The largest difference of logits that counts as rounding."""

_STOCK_REGISTRATION = nn.Module.register_parameter, nn.Module.register_buffer
_lock = threading.RLock()
_state = {"passed": False, "trying": False}
log = logging.getLogger("deepinsert")


def check_versions() -> None:
    """Run the self-check once, unless the installed versions were tested or have passed it before.

    Raises `UntriedVersionError`, which names the versions, the failed check, and the tested range.
    """
    if _state["passed"] or os.environ.get(SWITCH) == "0":
        return
    with _lock:
        if _state["passed"] or _state["trying"]:  # the trial itself calls this; other threads wait for it
            return
        _state["trying"] = True
        try:
            if not is_tried() and not _has_passed():
                run_trial()
                _record_pass()
            _state["passed"] = True
        finally:
            _state["trying"] = False


def run_trial() -> None:
    """Run all checks. Raises `UntriedVersionError` if one fails."""
    names = f"transformers {installed('transformers')} with torch {installed('torch')}"
    started = time.perf_counter()
    with _isolated():
        for name, check in CHECKS.items():
            try:
                fault = check()
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"
            if fault:
                raise UntriedVersionError(
                    f"{names} was not tested before and does not work: {name}: {fault}. {tried_range()}; "
                    f"install one of them, or set {SWITCH}=0 to go on at the risk of wrong numbers"
                )
    seconds = time.perf_counter() - started
    log.info("%s was not tested before; it passed the self-check in %.1f s", names, seconds)


def _layer_0() -> str:
    """Compare insert layer 0 with the stock model, bit for bit; return the fault, or nothing."""
    stock, inputs = _model(), _inputs()
    return _difference(_logits(_inserted(stock, 0), inputs), _logits(stock, inputs), 0.0)


def _masked_reference() -> str:
    """Compare an insert layer with stock layers that mask multimodal tokens; return the fault, or nothing."""
    stock, inputs = _model(), _inputs()
    with _multimodal_waiting(stock.model.language_model.layers, inputs["input_ids"][0] == IMAGE):
        expected = _logits(stock, inputs)
    if torch.allclose(expected, _logits(stock, inputs), atol=TOLERANCE):
        return "an insert layer changes nothing"
    return _difference(_logits(_inserted(stock, INSERT_LAYER), inputs), expected, TOLERANCE)


def _cached_generation() -> str:
    """Compare generation with and without the KV cache; return the fault, or nothing."""
    model, inputs = _inserted(_model(), INSERT_LAYER), _inputs(rows=2)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        cached = model.generate(**inputs, **options, use_cache=True)
        recomputed = model.generate(**inputs, **options, use_cache=False)
    if torch.equal(cached, recomputed):
        return ""
    return f"tokens {cached.tolist()} and without it {recomputed.tolist()}"


def _one_layer_per_row() -> str:
    """Compare rows with different insert layers with each row alone; return the fault, or nothing."""
    model, inputs, layers = _inserted(_model(), 0), _inputs(rows=2), (INSERT_LAYER, 1)
    insertion = getattr(find_stack(model), ATTRIBUTE)
    with insertion.overridden(Override(layers)):
        together = _logits(model, inputs)
    for row, layer in enumerate(layers):
        real = inputs["attention_mask"][row].bool()
        with insertion.overridden(Override((layer,))):
            alone = _logits(model, _inputs(rows=2, only=row))
        if fault := _difference(together[row][real], alone[0], TOLERANCE):
            return f"row {row}: {fault}"
    return ""


CHECKS: dict[str, Callable[[], str]] = {
    "insert layer 0 against the stock model": _layer_0,
    f"insert layer {INSERT_LAYER} against the stock model with multimodal tokens masked": _masked_reference,
    "generation with the cache against generation without it": _cached_generation,
    "one insert layer per row against each row alone": _one_layer_per_row,
}
"""Each check by name. It returns the fault, or an empty string."""


def _model() -> Any:
    """Build a small LLaVA with random weights, on the CPU in float32."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=8, patch_size=4),
        text_config=LlamaConfig(**sizes, num_hidden_layers=LAYERS, vocab_size=WORDS),
        image_token_index=IMAGE,
    )
    with _real_parameters():
        model: Any = LlavaForConditionalGeneration(config)
    model.eval()
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(8)  # so that a wrong row shows in the logits
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [IMAGE]
    return model


def _inputs(rows: int = 1, only: int | None = None) -> dict[str, Tensor]:
    """Return the inputs of one or two rows with words and an image, padded on the left; or of row `only`."""
    texts = [[7, 8, *[IMAGE] * IMAGE_TOKENS, 9, 10], [11, *[IMAGE] * IMAGE_TOKENS, 12, 13, 14, 15]][:rows]
    longest = max(map(len, texts))
    indices = range(rows) if only is None else [only]
    padded = [[0] * (longest - len(texts[row])) + texts[row] for row in indices]
    ids = torch.tensor(padded if only is None else [texts[only]])
    pixels = torch.linspace(-1, 1, rows * 3 * 64).view(rows, 3, 8, 8).sin()
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels[list(indices)]}


def _inserted(model: Any, layer: int) -> Any:
    """Return a copy of the model with an insert layer."""
    inserted = copy.deepcopy(model)
    insertion = Insertion(inserted, find_stack(inserted))
    insertion.install()
    insertion.insert_layer = layer
    return inserted


def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits (B, S, V) of one forward without a cache."""
    with torch.no_grad():
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def _difference(logits: Tensor, expected: Tensor, allowed: float) -> str:
    """Return a sentence about logits that differ by more than `allowed`, or are NaN; else nothing."""
    largest = float((logits - expected).abs().max())
    return "" if largest <= allowed else f"logits differ by {largest:.2g}"


@contextmanager
def _multimodal_waiting(layers: nn.ModuleList, multimodal: Tensor) -> Iterator[None]:
    """Below the insert layer, leave the positions `multimodal` (S,) unchanged and hidden from all others."""
    layer_input: list[Tensor] = []

    def before(layer: nn.Module, args: tuple[Any, ...], call: dict[str, Any]) -> Any:
        layer_input[:] = args[:1] or [call["hidden_states"]]
        visible = torch.ones(len(multimodal), len(multimodal), dtype=torch.bool).tril()
        visible &= multimodal[:, None] | ~multimodal[None, :]
        return args, call | {"attention_mask": visible[None, None]}

    def after(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return map_hidden(output, lambda hidden: torch.where(multimodal[:, None], layer_input[0], hidden))

    handles = []
    for layer in layers[:INSERT_LAYER]:
        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _real_parameters() -> Iterator[None]:
    """Create modules with real parameters inside this block.

    accelerate's `init_empty_weights` replaces methods of `nn.Module` and would put them on the meta device.
    """
    replaced = nn.Module.register_parameter, nn.Module.register_buffer
    # mypy forbids to assign methods, as accelerate does.
    nn.Module.register_parameter, nn.Module.register_buffer = _STOCK_REGISTRATION  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter, nn.Module.register_buffer = replaced  # type: ignore[method-assign]


@contextmanager
def _isolated() -> Iterator[None]:
    """Compute on the CPU in float32 inside this block, and leave the caller's random state unchanged."""
    default = torch.get_default_dtype()
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        torch.inference_mode(False),
    ):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def _record_file() -> Path:
    """Return the file that lists the combinations of versions that passed."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepinsert" / "self_check.json"


def _combination() -> str:
    """Return the installed versions as one line."""
    try:
        package = version("deepinsert")
    except PackageNotFoundError:  # run from a checkout
        package = "none"
    return f"deepinsert {package}, transformers {installed('transformers')}, torch {version('torch')}"


def _has_passed() -> bool:
    """Whether the file lists the installed versions."""
    try:
        return _combination() in json.loads(_record_file().read_text("utf-8"))
    except (OSError, ValueError):
        return False


def _record_pass() -> None:
    """Record that the installed versions passed; if the file cannot be written, each process checks again."""
    path = _record_file()
    try:
        combinations = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        combinations = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(sorted({*combinations, _combination()})), "utf-8")
        temporary.replace(path)
    except OSError as error:
        log.debug("The self-check could not be recorded: %s", error)
