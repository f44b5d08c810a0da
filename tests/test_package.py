"""The wheel that users install: `deepinsert` and nothing else, with its types and its weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel, built from a copy of what git tracks."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is not a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name, follow_symlinks=False)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(target), str(source)], check=True)
    return next(target.glob("*.whl"))


def test_a_wheel_holds_one_package_with_types_and_weights(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "deepinsert",
        wheel.stem.split("-py3")[0] + ".dist-info",
    }
    modules = {
        f"deepinsert/{path.relative_to(ROOT).as_posix()}"
        for room in ("backbones", "envs", "controller")
        for path in (ROOT / room).rglob("*.py")
    }
    assert modules == {name for name in names if name.endswith(".py")} - {"deepinsert/__init__.py"}
    assert {"deepinsert/py.typed", "deepinsert/backbones/tiny/model.safetensors"} <= set(names)


def test_an_installed_wheel_works_beside_a_users_own_packages(wheel, tmp_path):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True)
    for name in ("backbones", "controller", "envs", "scripts"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('a module of the user')")
    program = """
import deepinsert, sys
assert "torch" not in sys.modules
print(deepinsert.__file__)
for name in deepinsert.__all__:
    assert getattr(deepinsert, name), name
import gymnasium
assert "DeepInsert/InsertLayer-v0" in gymnasium.registry
assert set(deepinsert.__all__) <= set(dir(deepinsert))
print(deepinsert.load_backbone("tiny", device="cpu").num_layers)
"""
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    path, layers = finished.stdout.split()
    assert Path(path).is_relative_to(site)
    assert layers == "8"


def test_an_unknown_public_name_is_an_attribute_error():
    import deepinsert

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = deepinsert.nothing
