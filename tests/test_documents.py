"""The commands and snippets of the pages that a newcomer reads run as they stand.

They run as in a user's own project: with the installed command, in a folder whose `envs/`, `controller/`,
`backbones/` and `scripts/` belong to the user and cannot be imported.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMAND = Path(sys.executable).with_name("deepinsert")
PAGES = ("README.md", "docs/python.md")
ALL_PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)
FOREIGN = ("backbones", "controller", "envs", "scripts")


def run(words: list[str], folder: Path) -> str:
    """The standard output of a command that must succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def blocks(page: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL
    )


def test_commands_and_snippets_run_as_written_in_a_users_folder(tmp_path):
    for name in FOREIGN:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('a package of the user')")
    set_up, *commands = blocks("README.md", "sh")
    assert [line.split("#")[0].split() for line in set_up.splitlines()] == [
        ["pip", "install", "-e", "."],  # tests/test_package.py installs the package
        ["deepinsert", "demo"],
    ]
    run([str(COMMAND), "demo", "--quick"], tmp_path)  # the same steps on less data
    for block in commands:
        for line in block.replace("\\\n", " ").splitlines():
            name, *words = shlex.split(line)
            assert name == "deepinsert"
            assert run([str(COMMAND), *words], tmp_path)
    for page in PAGES:
        snippets = blocks(page, "python")
        assert snippets
        for snippet in snippets:
            run([sys.executable, "-W", "ignore", "-c", snippet], tmp_path)


def test_the_picture_of_the_idea_is_drawn_by_its_script(tmp_path):
    script = tmp_path / "draw_idea.py"
    script.write_bytes((ROOT / "docs" / "draw_idea.py").read_bytes())
    run([sys.executable, str(script)], tmp_path)
    assert (tmp_path / "idea.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
)
def test_links_between_pages_lead_somewhere(page):
    text = (ROOT / page).read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            path, _, heading = target.partition("#")
            linked = (ROOT / page).parent / path if path else ROOT / page
            assert linked.exists(), target
            headings = re.findall(r"^#+ (.+)$", linked.read_text("utf-8"), re.MULTILINE) if heading else []
            assert not heading or heading in {title.lower().replace(" ", "-") for title in headings}, target
