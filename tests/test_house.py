"""The rules of the code's structure that CONTRIBUTING.md states, checked on the source files themselves."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("backbones", "envs", "controller")  # from the lowest to the highest
FOLDERS_OF_CODE = (*FLOORS, "scripts", "benchmarks", "tests", "docs")
PYTHON_FILES = [
    ROOT / "deepinsert/__init__.py",
    *sorted(path for folder in FOLDERS_OF_CODE for path in (ROOT / folder).rglob("*.py")),
]
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 60


def module_name(path: Path) -> str:
    """Return the dotted name under which a file is imported, such as `deepinsert.backbones.loading`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "deepinsert" else ("deepinsert", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path
    for path in PYTHON_FILES
    if path.relative_to(ROOT).parts[0] in ("deepinsert", *FLOORS)
}


def imported_modules(name: str) -> set[str]:
    """Return the modules of this project that a module imports, also in functions and for type checkers."""
    path = MODULES[name]
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    modules = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            submodules = {f"{source}.{alias.name}" for alias in node.names}
            modules |= {module if module in MODULES else source for module in submodules}
    return modules & MODULES.keys()


def picture_of_the_house() -> list[Path]:
    """Return the folders and files that the picture in CONTRIBUTING.md names, each below its folder.

    A line that starts with a folder names files of this folder; another line those of the folder above it.
    """
    section = (ROOT / "CONTRIBUTING.md").read_text("utf-8").split("## The house")[1].split("\n## ")[0]
    lines = section.split("```")[1].splitlines()
    paths, parents = [], [(-1, ROOT)]
    for line in lines:
        indent = len(line) - len(line.lstrip())
        while parents[-1][0] >= indent:
            parents.pop()
        if folder := re.match(r"\s*([\w/]+)/(?=\s|$)", line):
            parents.append((indent, parents[-1][1] / folder[1]))
            paths.append(parents[-1][1])
        paths += [parents[-1][1] / file for file in re.findall(r"\b\w+\.(?:py|md|typed)\b", line)]
    return paths


def package_folders() -> set[Path]:
    """Return the folders of the three floors that hold Python modules."""
    return {path.parent for floor in FLOORS for path in (ROOT / floor).rglob("*.py")}


def test_the_picture_of_the_house_names_only_what_exists():
    paths = picture_of_the_house()
    assert len(paths) > 50
    missing = [str(path.relative_to(ROOT)) for path in paths if not path.exists()]
    assert not missing, missing


def test_the_picture_of_the_house_shows_every_package():
    hidden = package_folders() - set(picture_of_the_house())
    assert not hidden, hidden


def test_pyproject_lists_every_package_and_no_other():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    assert all((folder / "__init__.py").exists() for folder in package_folders())
    assert set(packages) == {"deepinsert", *(module_name(folder) for folder in package_folders())}


def test_no_two_modules_have_the_same_file_name():
    modules = defaultdict(list)
    for name, path in MODULES.items():
        modules[path.name].append(name)
    repeated = [names for file, names in modules.items() if len(names) > 1 and file != "__init__.py"]
    assert not repeated, repeated


def test_no_file_is_too_long():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in PYTHON_FILES
    }
    too_long = {file: lines for file, lines in lengths.items() if lines > MOST_LINES_OF_A_FILE}
    assert not too_long, too_long


def test_no_function_is_too_long():
    lengths = {
        f"{path.relative_to(ROOT)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in PYTHON_FILES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    too_long = {function: lines for function, lines in lengths.items() if lines > MOST_LINES_OF_A_FUNCTION}
    assert not too_long, too_long


def test_no_modules_import_each_other_in_a_circle():
    try:
        TopologicalSorter({name: imported_modules(name) for name in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"Circle of imports: {' -> '.join(reversed(error.args[1]))}")


def test_no_import_runs_up_the_floors():
    upward = [
        f"{name} imports {other}"
        for level, floor in enumerate(FLOORS)
        for name in MODULES
        if name.split(".")[1:2] == [floor]
        for other in sorted(imported_modules(name))
        if other.split(".")[1:2] and other.split(".")[1] in FLOORS[level + 1 :]
    ]
    assert not upward, upward
