"""The pages of the documentation name only commands, options, files and modules that exist."""

from __future__ import annotations

import re
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest

from deepinsert.controller.cli import COMMANDS
from deepinsert.controller.option_checks import flag

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)
FOLDERS = "backbones|envs|controller|scripts|benchmarks|tests|docs"


def code_of(page: str) -> str:
    """Return the code blocks and the inline code of a page, one piece or one line of a block per line."""
    text = (ROOT / page).read_text("utf-8")
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    pieces = [block.replace("\\\n", " ") for block in blocks] + [piece.replace("\n", " ") for piece in inline]
    return "\n".join(pieces)


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_the_options_that_a_page_shows(page):
    for command, words in re.findall(r"(?<!from )\bdeepinsert ([a-z][a-z-]+)\b([^#\n]*)", code_of(page)):
        options = {flag(field.name) for field in fields(COMMANDS[command].options)} | {"--help"}
        assert set(re.findall(r"--[a-z][a-z-]*", words)) <= options, (command, words)


@pytest.mark.parametrize("page", PAGES)
def test_files_and_modules_that_a_page_names_exist(page):
    code = code_of(page)
    files = re.findall(rf"(?<![\w/.])(?:{FOLDERS})/[\w/]+\.(?:py|md|json|yaml)\b", code)
    assert [file for file in files if not (ROOT / file).exists()] == []
    names = [*re.findall(r"(?:from|import|-m) (deepinsert[\w.]*)", code)]
    names += [
        f"deepinsert.{name}" for name in re.findall(r"^((?:backbones|envs|controller)\.[\w.]+)$", code, re.M)
    ]
    assert [name for name in names if find_spec(name) is None] == []
