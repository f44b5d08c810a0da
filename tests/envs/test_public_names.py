"""The lazily loaded public names: each one exists, and type checkers see the same list."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ["deepinsert", "deepinsert.envs"]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_exists(name):
    package = importlib.import_module(name)
    assert set(package.__all__) <= set(dir(package))
    for public_name in package.__all__:
        assert getattr(package, public_name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = package.Nothing


@pytest.mark.parametrize("name", PACKAGES)
def test_type_checkers_see_every_lazy_name(name):
    """The imports under `if TYPE_CHECKING:` are the names and modules that `__getattr__` loads."""
    package = importlib.import_module(name)
    tree = ast.parse(Path(package.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert {node.names[0].asname: node.module for node in imports} == package._MODULE_OF
    assert len(imports) == len(package._MODULE_OF)


@pytest.mark.parametrize("name", PACKAGES)
def test_importing_the_package_registers_the_environment_without_torch(name):
    program = (
        f"import sys, gymnasium, {name} as package; package.register_envs();"
        "assert 'DeepInsert/InsertLayer-v0' in gymnasium.registry; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)
