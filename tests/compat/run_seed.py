"""Run the Python blocks of one seed document in this process: ``run_seed.py DOCUMENT``, in an empty folder.

Needs the folder ``tests`` in ``PYTHONPATH``, and a folder of its own in ``HF_HOME``.

``import bitsandbytes`` is qcore. Prints one JSON object a block, ``{"index": ..., "outcome": ..., "why": ...}``.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

import qcore
from seed_blocks import blocks_of, with_lines
from seed_manifest import DOCUMENTS, WITHOUT_GPU, Snippet

HUB_MODEL = re.compile(r'"( ?(?:facebook|meta-llama|NousResearch|bigscience)/[\w.-]+|model-name)"')
PUSH = re.compile(r'\.push_to_hub\("([\w-]+)"\)')
PUSHED = re.compile(r'"\{your_username\}/([\w-]+)"')


def tiny_models() -> dict[str, str]:
    """Folders of a Llama and a BLOOM with random weights: the guides' models have these module names."""
    from tiny_models import save_model, save_tokenizer
    from transformers import BloomConfig, BloomForCausalLM

    bloom = Path("bloom").absolute()
    torch.manual_seed(0)
    BloomForCausalLM(BloomConfig(vocab_size=48, hidden_size=64, n_layer=2, n_head=4)).save_pretrained(bloom)
    save_tokenizer(bloom)
    return {"LLAMA": str(save_model("llama", Path("llama").absolute(), torch.float32)), "BLOOM": str(bloom)}


def cached_c4() -> None:
    """The file of C4 that guides calibrate with, with a few texts in it, in the hub's cache (``HF_HOME``)."""
    from tiny_models import WORDS

    from qcore.integrations.calibration_data import C4

    repository, file = C4
    folder = Path(os.environ["HF_HOME"], "hub", f"datasets--{repository.replace('/', '--')}")
    commit = "0" * 40
    path = folder / "snapshots" / commit / file
    path.parent.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(3, len(WORDS), (40, 60), generator=generator).tolist()
    with gzip.open(path, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps({"text": " ".join(WORDS[each] for each in row)}) + "\n" for row in picks)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit, encoding="utf-8")


def runnable(text: str, snippet: Snippet) -> str:
    """The block as it runs here."""
    if snippet.lines:
        text = with_lines(text, snippet.lines)
    changes = [*snippet.replace, *(() if torch.cuda.is_available() else WITHOUT_GPU)]
    for old, new in changes:
        text = text.replace(old, new)
    for old, _ in snippet.replace:
        assert old not in text or old in dict(snippet.replace)[old], f"{old!r} is not in the block"
    text = HUB_MODEL.sub(lambda match: "BLOOM" if "bigscience" in match[1] else "LLAMA", text)
    text = PUSHED.sub(r'"hub/\1"', PUSH.sub(r'.save_pretrained("hub/\1")', text))
    return re.sub(r"""(['"])cuda\1""", "DEVICE", text).replace(".cuda()", ".to(DEVICE)")


def run(document: str) -> None:
    digest = hashlib.sha256(document.encode()).hexdigest()
    _, snippets = DOCUMENTS[digest]
    blocks = blocks_of(document)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names: dict[str, Any] = {**tiny_models(), "DEVICE": device, "GPU": torch.cuda.is_available(), "Path": Path}
    for snippet in snippets:
        outcome, why = "passed", ""
        try:
            ast.parse(source := runnable(blocks[snippet.index].text, snippet))
            exec(compile(snippet.setup, f"<setup of block {snippet.index}>", "exec"), names)
            exec(compile(source, f"<block {snippet.index}>", "exec"), names)
            if not eval(snippet.check, names):
                outcome, why = "failed", f"not true afterwards: {snippet.check}"
        except Exception:  # whatever a snippet raises is its outcome
            outcome, why = "failed", traceback.format_exc(limit=-4)
        print(json.dumps({"index": snippet.index, "outcome": outcome, "why": why}), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    qcore.install_as_bitsandbytes()
    cached_c4()
    run(Path(sys.argv[1]).read_text(encoding="utf-8"))
