"""Renderings of a run: JSON is the source, JUnit XML, Markdown and HTML are made from it.

``write_all(report, directory)`` writes ``report.json``, ``junit.xml``, ``report.md`` and ``report.html``.
"""

from __future__ import annotations

from pathlib import Path

from qcore_conformance.model import Report
from qcore_conformance.report.html import to_html
from qcore_conformance.report.json_file import from_json, read_json, to_json, write_json, write_text
from qcore_conformance.report.junit import to_junit
from qcore_conformance.report.markdown import to_markdown
from qcore_conformance.report.summary import Verdict, verdict

__all__ = [
    "Verdict",
    "from_json",
    "read_json",
    "to_html",
    "to_json",
    "to_junit",
    "to_markdown",
    "verdict",
    "write_all",
    "write_json",
]


def probe(directory: Path) -> None:
    """Make ``directory`` if it is missing, and see that a file can be written there; raises ``OutputError``."""
    trial = directory / ".report"
    write_text(trial, "")
    trial.unlink()


def write_all(report: Report, directory: Path) -> list[Path]:
    """Write every rendering into ``directory`` (made if missing) and return their paths.

    The JSON is written first and the others are made from what it reads back as: they cannot say more than it does.

    Raises
    ------
    OutputError
        A file could not be written; an older one of that name still exists.
    """
    source = directory / "report.json"
    write_json(report, source)
    report = read_json(source)
    texts = {"junit.xml": to_junit(report), "report.md": to_markdown(report), "report.html": to_html(report)}
    for name, text in texts.items():
        write_text(directory / name, text)
    return [source, *(directory / name for name in texts)]
