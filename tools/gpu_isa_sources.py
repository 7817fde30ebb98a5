"""Fingerprints of the GPU kernels' sources: whether the record of their machine code is still of what stands here.

A fingerprint is of one kernel file for one target: its tokens and those of all that it includes for that target's
compiler, and what the CMakeLists.txt there sets and passes to it. Comments, blank space and line breaks do not count.
What the compilers' own headers say is theirs: the record names the compilers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "backends" / "kernels"
_FOLDERS = (KERNELS, ROOT / "backends" / "common", ROOT / "qcore" / "include")
# What the other targets include instead, by name.
_FOREIGN = {"cuda": re.compile(r"_hip\.|^simt/"), "hip": re.compile(r"_cuda\.|^simt/")}
# Declarations for the host's part of a kernel file. No kernel can call a function of the host, and these have nothing
# else: no constant, no macro, no type that a kernel takes (a test looks).
HOST_ONLY = ("arguments.h", "ops.h")

_COMMENT = r"//(?:\\\n|[^\n])*|/\*.*?\*/"
_NUMBER = r"\.?\d(?:[eEpP][+-]|'\w|[\w.])*"
_TEXT = r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\''
_OPERATOR = r"<<=|>>=|\.\.\.|->\*|::|\+\+|--|->|&&|\|\||<<|>>|##|[-+*/%&|^!=<>]=|\S"
# The end of a line means something to the preprocessor alone: it stays where a line is one of its own.
_TOKEN = re.compile(rf"(?P<comment>{_COMMENT})|(?P<end>\n)|\\\n|(?P<token>{_NUMBER}|{_TEXT}|\w+|{_OPERATOR})", re.S)


def backend_of(target: str) -> str:
    """``"hip"`` of gfx1100, ``"cuda"`` of sm_90."""
    return "hip" if target.startswith("gfx") else "cuda"


def kernel_files() -> list[str]:
    """Names of the kernel files without .cu, as sources.cmake lists them."""
    found = re.findall(r"\$\{KERNELS\}/(\w+)\.cu\b", (KERNELS / "sources.cmake").read_text(encoding="utf-8"))
    if not found:
        raise SystemExit("backends/kernels/sources.cmake: lists no kernel file as ${KERNELS}/name.cu")
    return found


def tokens(text: str) -> Iterator[str]:
    """The tokens of C++; each line of the preprocessor ends with one that is a line's end."""
    directive, fresh = False, True
    for match in _TOKEN.finditer(text):
        if match["end"]:
            if directive:
                yield "\n"
            directive, fresh = False, True
        elif match["token"]:
            directive = directive or (fresh and match["token"] == "#")
            fresh = False
            yield match["token"]


def included(file: str, backend: str) -> set[Path]:
    """Kernel file ``file`` and every file of the repository that it includes for a backend."""
    found: set[Path] = set()
    waiting = [KERNELS / f"{file}.cu"]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _includes(path, backend)
    return found


@cache
def _includes(path: Path, backend: str) -> list[Path]:
    names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.M)
    wanted = [name for name in names if not _FOREIGN[backend].search(name) and Path(name).name not in HOST_ONLY]
    return [_find(name, path) for name in wanted]


def _find(name: str, by: Path) -> Path:
    for folder in (by.parent, *_FOLDERS):
        if (folder / name).is_file():
            return (folder / name).resolve()
    raise SystemExit(f'{by.relative_to(ROOT)}: includes "{name}", which is in none of {", ".join(map(str, _FOLDERS))}')


@cache
def _digest(path: Path) -> str:
    return hashlib.sha256("\0".join(tokens(path.read_text(encoding="utf-8"))).encode()).hexdigest()


def build_flags(backend: str) -> list[str]:
    """What a CMakeLists.txt sets and passes to the compiler, a statement each, but for the list of targets."""
    text = re.sub(r"#[^\n]*", "", (ROOT / "backends" / backend / "CMakeLists.txt").read_text(encoding="utf-8"))
    found = []
    for match in re.finditer(r"^\s*(set|list|target_compile_definitions|target_compile_options)\s*\(", text, re.M):
        depth, end = 1, match.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        statement = " ".join(text[match.start() : end].split())
        if not re.match(r"set\(\w*ARCHITECTURES", statement):
            found.append(statement)
    return found


def fingerprint(file: str, target: str) -> str:
    """Of kernel file ``file`` (a name without .cu) for a target: 16 hexadecimal digits."""
    backend = backend_of(target)
    parts = sorted(f"{path.relative_to(ROOT).as_posix()} {_digest(path)}" for path in included(file, backend))
    return hashlib.sha256("\n".join([*build_flags(backend), *parts]).encode()).hexdigest()[:16]
