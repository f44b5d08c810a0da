"""A trial of the mechanism under versions of transformers and torch that nobody has tried yet.

A LLaVA of a few thousand weights is compared with itself: stock, with multimodal tokens masked, with and
without a cache, alone and in a batch. What passed is remembered per combination of versions.
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

from .calls import ATTRIBUTE
from .forward_state import Override
from .routing import Insertion

SWITCH = "DEEPINSERT_SELF_CHECK"
"""The environment variable that is 0 to do without."""

IMAGE, IMAGE_TOKENS, WORDS = 5, 4, 32
LAYERS, INSERT_LAYER = 3, 2
TOLERANCE = 1e-4

_STOCK_REGISTRATION = nn.Module.register_parameter, nn.Module.register_buffer
_lock = threading.RLock()
_state = {"passed": False, "trying": False}
log = logging.getLogger("deepinsert")


def check_versions() -> None:
    """Try the mechanism, once, where the installed versions are not among those that are known to work.

    Raises `UntriedVersionError` naming the versions, what failed, and the range that works.
    """
    if _state["passed"] or os.environ.get(SWITCH) == "0":
        return
    with _lock:
        if _state["passed"] or _state["trying"]:  # the trial itself inserts; other threads wait for it
            return
        _state["trying"] = True
        try:
            if not is_tried() and not _remembered():
                run_trial()
                _remember()
            _state["passed"] = True
        finally:
            _state["trying"] = False


def run_trial() -> None:
    """The trial itself. Raises `UntriedVersionError`."""
    names = f"transformers {installed('transformers')} with torch {installed('torch')}"
    started = time.perf_counter()
    with _apart():
        for name, check in CHECKS.items():
            try:
                fault = check()
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"
            if fault:
                raise UntriedVersionError(
                    f"{names}, which nobody has tried, does not work: {name}: {fault}. {tried_range()}; "
                    f"install one of them, or set {SWITCH}=0 to go on at the risk of wrong numbers"
                )
    log.info("%s: not tried before; the self-check passed in %.1f s", names, time.perf_counter() - started)


def _layer_0() -> str:
    stock, inputs = _model(), _inputs()
    return _difference(_logits(_inserted(stock, 0), inputs), _logits(stock, inputs), 0.0)


def _masked_reference() -> str:
    stock, inputs = _model(), _inputs()
    with _waiting(stock.model.language_model.layers, inputs["input_ids"][0] == IMAGE):
        expected = _logits(stock, inputs)
    if torch.allclose(expected, _logits(stock, inputs), atol=TOLERANCE):
        return "an insert layer changes nothing"
    return _difference(_logits(_inserted(stock, INSERT_LAYER), inputs), expected, TOLERANCE)


def _cached_generation() -> str:
    model, inputs = _inserted(_model(), INSERT_LAYER), _inputs(rows=2)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        cached, again = (model.generate(**inputs, **options, use_cache=kept) for kept in (True, False))
    return "" if torch.equal(cached, again) else f"tokens {cached.tolist()} and without it {again.tolist()}"


def _one_layer_per_row() -> str:
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


def _model() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=8, patch_size=4),
        text_config=LlamaConfig(**sizes, num_hidden_layers=LAYERS, vocab_size=WORDS),
        image_token_index=IMAGE,
    )
    with _real_parameters():
        model: Any = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(8)  # so that a wrong row shows
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [IMAGE]
    return model


def _inputs(rows: int = 1, only: int | None = None) -> dict[str, Tensor]:
    """A row of words and an image, and a longer one; padded on the left, or one of them alone."""
    texts = [[7, 8, *[IMAGE] * IMAGE_TOKENS, 9, 10], [11, *[IMAGE] * IMAGE_TOKENS, 12, 13, 14, 15]][:rows]
    longest = max(map(len, texts))
    chosen = range(rows) if only is None else [only]
    padded = [[0] * (longest - len(texts[row])) + texts[row] for row in chosen]
    ids = torch.tensor(padded if only is None else [texts[only]])
    pixels = torch.linspace(-1, 1, rows * 3 * 64).view(rows, 3, 8, 8).sin()
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels[list(chosen)]}


def _inserted(model: Any, layer: int) -> Any:
    inserted = copy.deepcopy(model)
    insertion = Insertion(inserted, find_stack(inserted))
    insertion.install()
    insertion.insert_layer = layer
    return inserted


def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def _difference(got: Tensor, expected: Tensor, allowed: float) -> str:
    most = float((got - expected).abs().max())
    return f"logits differ by {most:.2g}" if not most <= allowed else ""


@contextmanager
def _waiting(layers: nn.ModuleList, multimodal: Tensor) -> Iterator[None]:
    """Below the insert layer the positions `multimodal` (S,) stay as they are, and no other sees them."""
    entered: list[Tensor] = []

    def before(layer: nn.Module, args: tuple, call: dict[str, Any]) -> Any:
        entered[:] = args[:1] or [call["hidden_states"]]
        seen = torch.ones(len(multimodal), len(multimodal), dtype=torch.bool).tril()
        seen &= multimodal[:, None] | ~multimodal[None, :]
        return args, call | {"attention_mask": seen[None, None]}

    def after(layer: nn.Module, args: tuple, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        kept = torch.where(multimodal[:, None], entered[0], hidden)
        return (kept, *output[1:]) if isinstance(output, tuple) else kept

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
    """Modules made here have parameters of their own, also where accelerate's `init_empty_weights`, which
    replaces methods of `nn.Module`, would put them on the meta device."""
    replaced = nn.Module.register_parameter, nn.Module.register_buffer
    nn.Module.register_parameter, nn.Module.register_buffer = _STOCK_REGISTRATION  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter, nn.Module.register_buffer = replaced  # type: ignore[method-assign]


@contextmanager
def _apart() -> Iterator[None]:
    """On the CPU in float32, without a trace in the caller's random numbers."""
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


def _memory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepinsert" / "self_check.json"


def _key() -> str:
    try:
        own = version("deepinsert")
    except PackageNotFoundError:  # run from a checkout
        own = "none"
    return f"deepinsert {own}, transformers {installed('transformers')}, torch {version('torch')}"


def _remembered() -> bool:
    try:
        return _key() in json.loads(_memory().read_text("utf-8"))
    except (OSError, ValueError):
        return False


def _remember() -> None:
    """Note that these versions passed; where nothing can be written, each process tries anew."""
    path = _memory()
    try:
        known = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        known = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(sorted({*known, _key()})), "utf-8")
        temporary.replace(path)
    except OSError as error:
        log.debug("the self-check is not remembered: %s", error)
