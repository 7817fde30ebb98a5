"""The record of the GPU kernels' machine code, docs/results/gpu-isa.json: what is in it, and whether it still holds.

    python tools/gpu_isa_record.py --stale

prints the kernel files whose sources are no longer those that were recorded, with commas between. Every kernel file is
recorded for every target with the fingerprint of its sources (``gpu_isa_sources``), so that a part can be recorded
again and the rest still be known to hold: what is put into a record has the compiler of all that stays.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path

from gpu_isa_rules import TARGETS, Kernel, summary
from gpu_isa_sources import ROOT, backend_of, fingerprint, kernel_files

RECORD = ROOT / "docs" / "results" / "gpu-isa.json"
Part = tuple[str, str]  # kernel file, target


@dataclass
class Record:
    """Kernels, and what they were compiled from and by.

    Attributes
    ----------
    compilers : dict
        Backend (``"cuda"``, ``"hip"``) -> the line in which its compiler says its version.
    fingerprints : dict
        (kernel file, target) -> of the sources.
    """

    compilers: dict[str, str] = field(default_factory=dict)
    fingerprints: dict[Part, str] = field(default_factory=dict)
    kernels: list[Kernel] = field(default_factory=list)

    def stale(self) -> list[Part]:
        """What has to be recorded again, or for the first time: its sources are not those of the record."""
        parts = [(file, target) for file in kernel_files() for target in TARGETS]
        return [part for part in parts if self.fingerprints.get(part) != fingerprint(*part)]

    def put(self, kernels: Sequence[Kernel], compilers: dict[str, str]) -> None:
        """Replace the parts that ``kernels`` are of, whole, as compiled from the sources that stand here now."""
        parts = {(kernel.file, kernel.target) for kernel in kernels}
        # What a file or a target that is gone has left is no longer wanted.
        known = {(file, target) for file in kernel_files() for target in TARGETS}
        if unknown := sorted(parts - known):
            raise SystemExit(f"{unknown[0]} is no kernel file for a target of gpu_isa_rules")
        stays = (known & set(self.fingerprints)) - parts
        for backend, name in compilers.items():
            others = sorted(file for file, target in stays if backend_of(target) == backend)
            if others and self.compilers.get(backend) != name:
                raise SystemExit(
                    f"the record's {backend} kernels were compiled by {self.compilers.get(backend)}, these by {name}: "
                    f"they do not mix; record all of them (nox -s isa -- {backend}), {others[0]}.cu too"
                )
        self.compilers |= compilers
        kept = {part: self.fingerprints[part] for part in stays}
        self.fingerprints = dict(sorted((kept | {part: fingerprint(*part) for part in parts}).items()))
        rows = [kernel for kernel in self.kernels if (kernel.file, kernel.target) in stays]
        self.kernels = sorted([*rows, *kernels], key=lambda kernel: (kernel.target, kernel.name, astuple(kernel)))

    def differences(self, kernels: Iterable[Kernel], compilers: dict[str, str]) -> list[str]:
        """What compiling again gave that the record does not say, a sentence each."""
        kernels = list(kernels)
        wrong = [
            f"compiled by {name}, the record by {self.compilers.get(backend)}: compile with that one, or record again"
            for backend, name in compilers.items()
            if self.compilers.get(backend) != name
        ]
        if wrong:
            return wrong
        for part in sorted({(kernel.file, kernel.target) for kernel in kernels}):
            here, there = (
                Counter(kernel for kernel in several if (kernel.file, kernel.target) == part)
                for several in (kernels, self.kernels)
            )
            file, target = part
            names = sorted({kernel.name for kernel in (*(here - there), *(there - here))})
            if names:
                wrong.append(
                    f"{target} {file}.cu: {len(names)} kernels are not as recorded, such as {names[0]}; "
                    f"look at them and record them: nox -s isa -- --only {file}"
                )
        return wrong


def load(path: Path = RECORD) -> Record:
    """The record in a file."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    return Record(
        tree["machine"]["compilers"],
        {(file, target): one for file, targets in tree["fingerprints"].items() for target, one in targets.items()},
        [Kernel(**dict(zip(tree["columns"], row, strict=True))) for row in tree["kernels"]],
    )


def write(record: Record, folder: Path) -> None:
    """gpu-isa.json, a line for each kernel, and the page gpu-isa.md."""
    folder.mkdir(parents=True, exist_ok=True)
    fingerprints: dict[str, dict[str, str]] = {}
    for (file, target), one in record.fingerprints.items():
        fingerprints.setdefault(file, {})[target] = one
    head = {
        "schema": 1,
        "kind": "machine code",
        "machine": {"compilers": dict(sorted(record.compilers.items()))},
        "columns": [column.name for column in fields(Kernel)],
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    lines.append(
        ' "fingerprints": ' + _lines("{", (f"{json.dumps(k)}: {json.dumps(v)}" for k, v in fingerprints.items()))
    )
    lines.append(' "kernels": ' + _lines("[", (json.dumps(astuple(kernel)) for kernel in record.kernels)))
    (folder / "gpu-isa.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    (folder / "gpu-isa.md").write_text(summary(record.kernels), encoding="utf-8")


def _lines(bracket: str, entries: Iterable[str]) -> str:
    return bracket + "\n" + ",\n".join(f"  {entry}" for entry in entries) + "\n " + {"{": "}", "[": "]"}[bracket]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stale", action="store_true", required=True, help="which files have to be recorded again")
    parser.parse_args()
    print(",".join(dict.fromkeys(file for file, _ in load().stale())))
