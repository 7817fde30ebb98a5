"""Every Python block of the seed documents runs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from seed_blocks import blocks_of, with_lines
from seed_manifest import DOCUMENTS

FOLDER = os.environ.get("QCORE_SEEDS", "")
needs_documents = pytest.mark.skipif(
    not FOLDER, reason="QCORE_SEEDS does not name a folder with the seed documents, which are not in the repository"
)

MARKDOWN = "text\n```python\nx = 1\n```\n1. item\n   ```py\n   if x:\n       y = 2\n   ```\n```bash\nls\n```\n"
RST = "Text\n\n   .. code-block:: python\n\n      a = 1\n\n      b = 2\n\n   more text\n"


def test_blocks_are_found_in_both_kinds_of_markup() -> None:
    found = blocks_of(MARKDOWN)
    assert [(block.text, block.is_python) for block in found] == [
        ("x = 1", True),
        ("if x:\n    y = 2", True),
        ("ls", False),
    ]
    assert [block.text for block in blocks_of(RST)] == ["a = 1\n\nb = 2"]


def test_lost_line_ends_come_back() -> None:
    assert with_lines("for i in x: f(i) g(i)", "0 12+4 17+4") == "for i in x:\n    f(i)\n    g(i)"


def documents() -> dict[str, Path]:
    """Path of each document of the folder, by its hash."""
    return {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in sorted(Path(FOLDER).iterdir())}


@needs_documents
def test_the_manifest_lists_every_python_block() -> None:
    found = documents()
    assert set(found) == set(DOCUMENTS)
    for digest, (_, snippets) in DOCUMENTS.items():
        blocks = blocks_of(found[digest].read_text(encoding="utf-8"))
        python = [index for index, block in enumerate(blocks) if block.is_python]
        assert [snippet.index for snippet in snippets] == python


@needs_documents
@pytest.mark.parametrize("digest", DOCUMENTS, ids=[name.replace(" ", "-") for name, _ in DOCUMENTS.values()])
def test_every_block_runs(digest: str, tmp_path: Path) -> None:
    path = documents()[digest].resolve()
    program = Path(__file__).with_name("run_seed.py")
    own = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(program.parents[1])}
    run = subprocess.run(
        [sys.executable, str(program), str(path)],
        cwd=tmp_path,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    results = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"index"')]
    _, snippets = DOCUMENTS[digest]
    assert [result["index"] for result in results] == [snippet.index for snippet in snippets]
    failed = [f"block {result['index']}: {result['why']}" for result in results if result["outcome"] == "failed"]
    assert not failed, "\n".join(failed)
    # `pytest -rP` shows the table.
    blocks = blocks_of(path.read_text(encoding="utf-8"))
    print("| block | begins with | outcome |\n|---|---|---|")
    for result in results:
        first = next(line for line in blocks[result["index"]].text.splitlines() if line.strip())
        print(f"| {result['index']} | `{first.strip()[:60]}` | {result['outcome']} {result['why']} |")
