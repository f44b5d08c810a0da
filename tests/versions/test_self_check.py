"""Untested versions run a self-check before the first insertion, and are refused if numbers are wrong."""

from __future__ import annotations

import inspect
import json
import threading

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from deepinsert.backbones import UntriedVersionError, deep_insert
from deepinsert.backbones.compat import versions
from deepinsert.backbones.compat.transformers import CACHE_ARGUMENTS
from deepinsert.backbones.mechanism import routing, self_check
from deepinsert.backbones.mechanism.calls import ATTRIBUTE
from deepinsert.backbones.mechanism.routing import Insertion
from deepinsert.backbones.mechanism.rows import Rows


@pytest.fixture
def untried(monkeypatch, tmp_path):
    """Make the installed versions untested, and return the file that would record that they pass."""
    monkeypatch.setattr(versions, "TRIED_TRANSFORMERS", ("5.999.0",))
    monkeypatch.setitem(self_check._state, "passed", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(self_check.SWITCH, raising=False)
    return tmp_path / "deepinsert" / "self_check.json"


@pytest.fixture
def cache_by_name(monkeypatch):
    """Break the mechanism: it looks up the cache by an argument's name in other versions, not by its type."""
    parameters = inspect.signature(LlamaDecoderLayer.forward).parameters
    other_name = next(name for name in CACHE_ARGUMENTS if name not in parameters)
    for module in ("routing", "grouping"):
        monkeypatch.setattr(
            f"deepinsert.backbones.mechanism.{module}.cache_in",
            lambda fields: dict(fields or {}).get(other_name),
        )


@pytest.fixture
def wrong_cache(monkeypatch):
    """Break transformers: its cache counts one position too many."""
    stock = DynamicLayer.get_seq_length
    monkeypatch.setattr(DynamicLayer, "get_seq_length", lambda layer: stock(layer) + bool(stock(layer)))


@pytest.fixture
def model():
    text = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text)).eval()


def test_working_versions_pass_and_are_recorded(untried, model, monkeypatch):
    deep_insert(model, 1)
    (combination,) = json.loads(untried.read_text())
    assert transformers.__version__ in combination and versions.installed("torch") in combination
    monkeypatch.setitem(self_check._state, "passed", False)
    monkeypatch.setattr(self_check, "run_trial", lambda: pytest.fail("the self-check ran twice"))
    deep_insert(model, 1)


@pytest.mark.parametrize("fault", ["cache_by_name", "wrong_cache"])
def test_versions_with_wrong_numbers_are_refused(untried, model, fault, request):
    request.getfixturevalue(fault)
    stock_class = type(model.model.language_model)
    for _ in range(2):  # the second call must be refused as well
        with pytest.raises(UntriedVersionError) as refusal:
            deep_insert(model, 1)
    message = str(refusal.value)
    assert f"transformers {transformers.__version__.partition('+')[0]} with torch" in message
    assert "generation with the cache against generation without it: " in message
    assert "5.999.0" in message and f"{self_check.SWITCH}=0" in message
    assert type(model.model.language_model) is stock_class and not hasattr(stock_class, ATTRIBUTE)
    assert not untried.exists()


def changed(stock, change):
    """Return the function `stock`, whose result is changed by `change`."""
    return lambda *args, **kwargs: change(stock(*args, **kwargs))


def flipped(output):
    """Return a stack's output with its rows in reverse order."""
    output.last_hidden_state = output.last_hidden_state.flip(0)
    return output


FAULTS = {
    "insert layer 0 against": (Insertion, "call_layer", lambda output: output + 1e-6),
    "insert layer 2 against": (Rows, "take", lambda rows: rows.flip(1) if rows.ndim == 3 else rows),
    "one insert layer per row": (routing, "run_in_groups", flipped),
}


@pytest.mark.parametrize("check", FAULTS)
def test_each_check_finds_its_fault(check, monkeypatch):
    """The error names the first check that fails; the check of generation is tested above."""
    owner, name, change = FAULTS[check]
    monkeypatch.setattr(owner, name, changed(getattr(owner, name), change))
    with pytest.raises(UntriedVersionError, match=check):
        self_check.run_trial()


def test_the_switch_turns_the_self_check_off(untried, model, monkeypatch, wrong_cache):
    monkeypatch.setenv(self_check.SWITCH, "0")
    deep_insert(model, 1)
    assert not untried.exists()


@pytest.mark.parametrize("content", ["nonsense", "[1, 2", "folder"])
def test_a_damaged_record_is_ignored(untried, model, content):
    untried.parent.mkdir(parents=True)
    if content == "folder":
        untried.mkdir()
    else:
        untried.write_text(content)
    deep_insert(model, 1)


def test_the_self_check_leaves_the_settings_of_torch_unchanged(untried, monkeypatch):
    """The random state and the default precision stay, and the default device is not used."""
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            self_check.check_versions()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "surroundings",
    [
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.inference_mode(),
        lambda: init_empty_weights(include_buffers=True),
    ],
    ids=["autocast", "inference mode", "empty weights"],
)
def test_the_self_check_passes_in_any_context(untried, surroundings):
    with surroundings():
        self_check.check_versions()
    assert untried.exists()


def test_threads_wait_for_the_self_check(untried, monkeypatch):
    runs, runs_seen_by_threads = [], []
    stock = self_check.run_trial

    def slow():
        stock()
        runs.append(threading.get_ident())

    monkeypatch.setattr(self_check, "run_trial", slow)

    def work():
        self_check.check_versions()
        runs_seen_by_threads.append(len(runs))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert runs_seen_by_threads == [1] * 4


@pytest.mark.parametrize(
    ("library", "version"), [("transformers", "4.57.6"), ("transformers", "5.0.0rc1"), ("torch", "2.5.1")]
)
def test_too_old_versions_are_refused_in_one_line(monkeypatch, library, version):
    monkeypatch.setattr(versions, "installed", lambda name: version if name == library else "99.0")
    with pytest.raises(
        ImportError, match=rf"^DeepInsert needs {library} \S+ or later, and this is {version}: .*$"
    ):
        versions.check_not_too_old()
