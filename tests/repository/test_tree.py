"""The tree speaks of the project alone, and reads as its layout promises."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Folders that only one machine has.
MACHINE_PATH = re.compile(r"(?<![\w.$}])/(work|root|home|tmp|Users)/\w")
# Papers, standards, sources, vendors' data sheets, and the example of the standards; no package index, no host of a
# machine.
HOSTS = {"arxiv.org", "example.org", "github.com", "huggingface.co", "keepachangelog.com", "semver.org", "www.w3.org"}
HOSTS |= {"www.nvidia.com", "resources.nvidia.com", "images.nvidia.com", "www.amd.com", "gpuopen.com"}
URL_HOST = re.compile(r"\bhttps?://([\w.-]+)")
LONGEST = 440


def tracked() -> list[Path]:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    listed = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    assert len(paths) > 50
    return [path for path in paths if path.is_file()]


def texts() -> list[tuple[str, str]]:
    """(path, text) of every tracked text file."""
    found = []
    for path in tracked():
        try:
            found.append((str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    return found


def test_no_file_names_a_machine_or_a_registry() -> None:
    named = []
    for path, text in texts():
        for number, line in enumerate(text.splitlines(), 1):
            foreign = [host for host in URL_HOST.findall(line) if host not in HOSTS]
            if foreign or MACHINE_PATH.search(line):
                named.append(f"{path}:{number}: {line.strip()}")
    assert not named, "\n".join(named)


def test_source_files_stay_readable() -> None:
    """A file that is much longer than 400 lines would rather be two."""
    suffixes = {".py", ".cpp", ".c", ".h", ".hpp", ".cu", ".cuh"}
    lengths = {path: text.count("\n") for path, text in texts() if Path(path).suffix in suffixes}
    assert not {path: length for path, length in lengths.items() if length > LONGEST}


def test_no_file_is_a_drawer() -> None:
    names = {path.stem.lower() for path in tracked()}
    assert not names & {"utils", "util", "helpers", "helper", "misc", "common"}


def test_the_abi_header_stays_short() -> None:
    assert (ROOT / "qcore/include/qcore_backend.h").read_text().count("\n") <= 240
