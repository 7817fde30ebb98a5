"""Code blocks of a document: Markdown fences (on lines of their own, or inline in a flattened text) and RST blocks."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

_FENCE = re.compile(r"```(?P<language>\w*)(?P<text>.*?)```", re.DOTALL)
_RST = re.compile(
    r"^(?P<indent> *)\.\. code-block:: (?P<language>\w+)\n(?P<text>(?:[ \t]*\n|(?P=indent) +\S.*\n?)+)", re.MULTILINE
)
PYTHON = frozenset({"python", "py"})


@dataclass(frozen=True)
class Block:
    """A code block: its language as the document gives it, and its text without common indentation."""

    language: str
    text: str

    @property
    def is_python(self) -> bool:
        return self.language in PYTHON


def blocks_of(document: str) -> list[Block]:
    """Every code block of ``document``, in order."""
    fenced = [(match.start(), match["language"], match["text"]) for match in _FENCE.finditer(document)]
    listed = [(match.start(), match["language"], match["text"]) for match in _RST.finditer(document)]
    return [
        Block(language, textwrap.dedent(text.expandtabs(4)).strip()) for _, language, text in sorted(fenced + listed)
    ]


def with_lines(text: str, lines: str) -> str:
    """A flattened block with its lines back: ``"0 24 60+4"`` starts them at 0, 24 and 60, the last indented by 4."""
    marks = [(int(start), int(indent or 0)) for start, _, indent in (mark.partition("+") for mark in lines.split())]
    ends = [start for start, _ in marks[1:]] + [len(text)]
    return "\n".join(" " * indent + text[start:end].rstrip() for (start, indent), end in zip(marks, ends))
