"""The JSON report: written and read with every field checked, so that later readings can trust it."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from qcore.errors import FormatError, OutputError
from qcore_conformance.model import SCHEMA, Outcome, Report, Result

_REPORT_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "schema": int,
    "spec_version": str,
    "started": str,
    "seconds": (int, float),
    "seed": int,
    "selection": dict,
    "complete": bool,
    "backend": dict,
    "environment": dict,
    "results": list,
}
_RESULT_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "case_id": str,
    "op": str,
    "level": str,
    "clauses": list,
    "outcome": str,
    "seconds": (int, float),
    "worst": (int, float, str, type(None)),
    "message": str,
    "repro": str,
    "waiver": (dict, type(None)),
}


def to_json(report: Report) -> str:
    """Render ``report`` as JSON text (strict: a worst ratio that is not finite becomes ``"inf"`` or ``"nan"``)."""
    tree = asdict(report)
    for result in tree["results"]:
        result["outcome"] = Outcome(result["outcome"]).value
        if result["worst"] is not None and not math.isfinite(result["worst"]):
            result["worst"] = str(float(result["worst"]))
    return json.dumps(tree, indent=1, allow_nan=False, default=str) + "\n"


def from_json(text: str, source: str = "report") -> Report:
    """Parse and check a JSON report.

    Raises
    ------
    FormatError
        The text is not JSON, its schema number is not ``SCHEMA``, or a field is missing, unknown or of a wrong type.
    """
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise FormatError(f"{source}: not a JSON report: {error}") from error
    if not isinstance(tree, dict) or "schema" not in tree:
        raise FormatError(f"{source}: expected an object with a 'schema' number; was this made by qcore-conformance?")
    if tree["schema"] != SCHEMA:
        raise FormatError(
            f"{source}: schema {tree['schema']!r}, this version reads {SCHEMA}; "
            "run the suite again, or read it with the version that wrote it"
        )
    _check_fields(tree, _REPORT_TYPES, source)
    results = [_result(entry, f"{source}: results[{index}]") for index, entry in enumerate(tree["results"])]
    seen: set[str] = set()
    for result in results:
        if result.case_id in seen:
            raise FormatError(f"{source}: case {result.case_id!r} stands in it twice")
        seen.add(result.case_id)
    return Report(**{**tree, "results": results})


def write_json(report: Report, path: Path) -> None:
    """Write ``report`` to ``path``; an older file is replaced only once the new one is complete."""
    write_text(path, to_json(report))


def read_json(path: Path) -> Report:
    """Read a report from ``path``; errors as :func:`from_json`, and ``FormatError`` if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read: {error}") from error
    return from_json(text, str(path))


def write_text(path: Path, text: str) -> None:
    """Write ``text`` under a temporary name beside ``path``, then rename; raises ``OutputError``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error


def _check_fields(tree: Mapping[str, Any], types: Mapping[str, type | tuple[type, ...]], where: str) -> None:
    for name, expected in types.items():
        if name not in tree:
            raise FormatError(f"{where}: field {name!r} is missing")
        value = tree[name]
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            raise FormatError(f"{where}: field {name!r} has type {type(value).__name__}")
    unknown = sorted(set(tree) - set(types))
    if unknown:
        raise FormatError(f"{where}: unknown fields {unknown}")


def _result(entry: Any, where: str) -> Result:
    if not isinstance(entry, dict):
        raise FormatError(f"{where}: expected an object, got {type(entry).__name__}")
    _check_fields(entry, _RESULT_TYPES, where)
    try:
        outcome = Outcome(entry["outcome"])
        worst = None if entry["worst"] is None else float(entry["worst"])
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from error
    return Result(**{**entry, "outcome": outcome, "worst": worst})


# A field added to the model without its check here would be written and then refused: fail at import instead.
assert {f.name for f in fields(Report)} == set(_REPORT_TYPES)
assert {f.name for f in fields(Result)} == set(_RESULT_TYPES)
