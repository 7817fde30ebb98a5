"""The documents are true: code runs, links lead somewhere, commands and options exist, deviations are listed."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/results/*.md")])
SPEC = sorted((ROOT / "docs" / "spec").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    return [code for found, code in BLOCK.findall(path.read_text(encoding="utf-8")) if found == language]


def shell_lines() -> list[tuple[str, str]]:
    """(document, command) of every line of a shell block."""
    return [
        (name(path), line)
        for path in GUIDES
        for code in blocks(path, "sh")
        for line in code.splitlines()
        if line and not line.startswith("#")
    ]


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [path for path in GUIDES if blocks(path, "python")], ids=name)
def test_python_examples_run(path: Path, tmp_path: Path) -> None:
    """All of a document's examples, one after the other, in a fresh interpreter."""
    program = tmp_path / "examples.py"
    program.write_text("\n".join(blocks(path, "python")), encoding="utf-8")
    run = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("path", [*GUIDES, *SPEC], ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_every_guide_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    documents = [path for path in [*ROOT.glob("docs/*.md"), *SPEC] if path.name != "README.md"]
    assert not [name(path) for path in documents if f"({path.relative_to(ROOT / 'docs')})" not in index]


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w[\w-]*):", makefile, re.MULTILINE))
    text = "\n".join(path.read_text(encoding="utf-8") for path in GUIDES)
    mentioned = set(re.findall(r"(?:`|^)make (\w+)", text, re.MULTILINE))
    assert mentioned >= {"demo", "test", "bench"}
    assert not mentioned - targets


@cache
def help_of(program: str, *command: str) -> str:
    (script,) = entry_points(group="console_scripts", name=program)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as end:
        script.load()([*command, "--help"])
    assert not end.value.code, f"{program} {' '.join(command)} --help"
    return said.getvalue()


@pytest.mark.parametrize(
    ("document", "line"), [pair for pair in shell_lines() if pair[1].startswith("qcore")], ids=lambda text: text
)
def test_commands_and_their_options_exist(document: str, line: str) -> None:
    program, command, *arguments = shlex.split(line, comments=True)
    known = help_of(program, command)
    if re.search(r"^Commands:$", known, re.MULTILINE):  # a group: the options are those of the next word
        known = help_of(program, command, arguments[0])
    options = [argument.partition("=")[0] for argument in arguments if argument.startswith("-")]
    assert not [option for option in options if not re.search(rf"(?<![\w-]){option}(?![\w-])", known)], document


def test_deviations_of_the_spec_are_listed() -> None:
    compat = (ROOT / "docs" / "compat.md").read_text(encoding="utf-8")
    listed = 0
    for path in SPEC:
        for paragraph in re.findall(r"^\*Deviation\*.*$", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert f"(spec/{path.name})" in compat, f"{path.name} has deviations that compat.md does not list"
            for group in re.findall(r"\((QC-[A-Z0-9]+-\d+(?:, -\d+)*)\)", paragraph):
                prefix = group.rsplit("-", 1)[0] if "," not in group else group.split(",")[0].rsplit("-", 1)[0]
                for number in re.findall(r"-(\d{3})", group):
                    assert f"{prefix}-{number}" in compat, f"{prefix}-{number} deviates; compat.md does not list it"
                    listed += 1
    assert listed >= 4
