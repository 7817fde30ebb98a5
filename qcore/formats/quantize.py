"""Quantize a checkpoint into a folder: the work behind ``qcore quantize``, without its console."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from qcore.errors import FormatError, OutputError
from qcore.formats.convert import ErrorSum, run_step
from qcore.formats.grouped import FILES
from qcore.formats.output import PartialOutput, check_target, open_partial, write_text, writing_failed
from qcore.formats.plan import Options, Plan, Step, make_plan
from qcore.formats.safetensors import SafetensorsFile
from qcore.formats.shard_writer import ShardWriter, verify_shard
from qcore.formats.source import INDEX, Source, open_source
from qcore.formats.step_log import StepLog, StepRecord


class Listener:
    """What a run tells while it goes; the console overrides these."""

    def planned(self, plan: Plan) -> None:
        """Everything is decided; nothing is written yet."""

    def kept(self, shard: str, nbytes: int) -> None:
        """A shard of an interrupted run is complete; ``nbytes`` of the source need not be read again."""

    def resumed(self, shard: str, tensors: int, of: int, nbytes: int) -> None:
        """As much of an unfinished shard is kept: ``tensors`` of the ``of`` that are read for it."""

    def read(self, nbytes: int) -> None:
        """``nbytes`` more of the source are done."""

    def calibrated(self, block: int, count: int) -> None:
        """Block ``block`` of ``count`` is quantized (gptq, awq)."""

    def verifying(self, shard: str) -> None:
        """A shard is written and is being read back."""


class Made(Protocol):
    """Tensors that were made before the shards are written, because they need the whole model (gptq, awq)."""

    def tensor(self, name: str) -> Tensor | None:
        """The tensor that the output is to hold under ``name``; None where the source's own is meant."""

    def error(self, step: Step) -> ErrorSum:
        """Of a step whose tensors were made."""


# (source, plan, folder for the output with a subfolder that is removed at the end, listener) -> tensors.
Make = Callable[[Source, Plan, PartialOutput, Listener], Made]
BLOCKS = "blocks"


@dataclass(frozen=True)
class KindRow:
    """One kind of layer: how many tensors and elements, bytes before and after, relative error (root mean square)."""

    kind: str
    action: str
    tensors: int
    numel: int
    before: int
    after: int
    error: float
    signal: float
    worst: float

    @property
    def relative(self) -> float:
        return ErrorSum(self.error, self.signal).relative


@dataclass(frozen=True)
class Report:
    """What was written: rows by kind of layer in the order of the model, bytes of the source's and output's weights.

    ``experts`` are fused weights that stayed in floating point.
    """

    rows: list[KindRow]
    before: int
    after: int
    dropped: list[str]
    experts: tuple[str, ...] = ()


def quantize_checkpoint(
    path: Path,
    out: Path,
    options: Options,
    *,
    force: bool = False,
    restart: bool = False,
    listener: Listener | None = None,
    make: Make | None = None,
) -> Report:
    """Quantize the checkpoint at ``path`` into the folder ``out``.

    Tensors stream one by one; see :mod:`qcore.formats.convert` for what is held in memory. An interrupted run (any
    exception, a kill, a crash) is continued by the same call.

    Parameters
    ----------
    path : Path
        A folder with safetensors files, or a GGUF file.
    out : Path
        Appears when it is complete and verified.
    options : Options
    force : bool
        Replace an existing model folder at ``out``; it is kept until the new one is complete.
    restart : bool
        Discard what an interrupted run left, whatever its arguments were.
    listener : Listener, optional
    make : callable, optional
        Makes the tensors of formats that need more than one tensor at a time; into the folder ``blocks`` of the output,
        so that an interrupted run finds them again.

    Raises
    ------
    FormatError
        The source is truncated, inconsistent or unknown.
    InvalidArgument
        An option does not fit the model.
    OutputError
        The output cannot be written, or would replace something that it must not.
    """
    listener = listener or Listener()
    check_target(out, path, force)
    source = open_source(path)
    try:
        plan = make_plan(source, options)
        listener.planned(plan)
        stats = source.stats()
        identity = {"options": options.as_dict(), "source files": stats, "layout of the output": _fingerprint(plan)}
        room = plan.nbytes * (1 if make is None else 2)
        with open_partial(out, identity, restart=restart, nbytes=room) as partial:
            made = None if make is None else make(source, plan, partial, listener)
            results = _write_shards(plan, source, partial, listener, made)
            if source.stats() != stats:
                raise FormatError(f"{path}: its files changed while they were read; run again with --restart")
            _write_companions(plan, source, partial)
            shutil.rmtree(partial.path / BLOCKS, ignore_errors=True)
            partial.commit(f"{out.name}.old-{os.getpid()}")
        after = sum((out / shard).stat().st_size for shard in plan.shard_names())
        before = sum(info.nbytes for info in source.tensors.values())
        return Report(_rows(plan, results), before, after, plan.dropped, plan.experts)
    finally:
        source.close()


def _fingerprint(plan: Plan) -> str:
    text = json.dumps([[asdict(spec) for step in shard for spec in step.specs] for shard in plan.shards], default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _specs(shard: list[Step]) -> list[Any]:
    return [spec for step in shard for spec in step.specs]


def _write_shards(
    plan: Plan, source: Source, partial: PartialOutput, listener: Listener, made: Made | None
) -> list[ErrorSum]:
    results: list[ErrorSum] = []
    for name, shard in zip(plan.shard_names(), plan.shards, strict=True):
        finished = _verified(partial, name, shard)
        if finished is None:
            finished = _write_shard(partial.path / name, shard, source, partial.steps(name), listener, made)
            partial.record(name, finished)
        else:
            listener.kept(name, sum(step.info.nbytes for step in shard))
        results += [ErrorSum(*pair) for pair in finished["errors"]]
    return results


def _verified(partial: PartialOutput, name: str, shard: list[Step]) -> dict[str, Any] | None:
    """The journal's entry of a finished shard whose bytes are still what they were."""
    finished = partial.finished(name)
    if finished is None:
        return None
    try:
        verify_shard(partial.path / name, _specs(shard), finished["sha256"])
    except FormatError:
        partial.forget(name)
        return None
    return finished


def _write_shard(
    path: Path, shard: list[Step], source: Source, log: StepLog, listener: Listener, made: Made | None
) -> dict[str, Any]:
    records = log.load()
    writer = ShardWriter(path, _specs(shard), resume=bool(records))
    try:
        errors = _restore(writer, shard, records, log)
        if errors:
            nbytes = sum(step.info.nbytes for step in shard[: len(errors)])
            listener.resumed(path.name, len(errors), len(shard), nbytes)
        for step in shard[len(errors) :]:
            errors.append(_write_step(step, source, writer, listener, made))
            log.append(_record(writer, step, errors[-1]))
            _return_free_memory()
        digests = writer.finish()
    finally:
        writer.close()
    listener.verifying(path.name)
    try:
        verify_shard(path, _specs(shard), digests)
    except FormatError as error:
        log.remove()
        raise OutputError(f"{error}; the disk or the memory may be failing") from error
    return {"sha256": digests, "errors": [[total.error, total.signal] for total in errors]}


def _write_step(step: Step, source: Source, writer: ShardWriter, listener: Listener, made: Made | None) -> ErrorSum:
    tensors = {} if made is None else {spec.name: made.tensor(spec.name) for spec in step.specs}
    ready = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if made is None or len(ready) < len(step.specs):
        return run_step(step, source, writer, listener.read)
    for name, tensor in ready.items():
        writer.write(name, tensor)
    listener.read(step.info.nbytes)
    return made.error(step)


def _record(writer: ShardWriter, step: Step, total: ErrorSum) -> StepRecord:
    late = {spec.name: writer.late_text(spec.name) for spec in step.specs if spec.late}
    texts = {name: text.decode() for name, text in late.items() if text is not None}
    return StepRecord(writer.digests([spec.name for spec in step.specs]), texts, total.error, total.signal)


def _restore(writer: ShardWriter, shard: list[Step], records: list[StepRecord], log: StepLog) -> list[ErrorSum]:
    """Take over the steps whose bytes are still what they were; the log ends with the last of them."""
    kept = 0
    for step, record in zip(shard, records, strict=False):
        late = {name: text.encode() for name, text in record.late.items()}
        if set(record.sha256) != {spec.name for spec in step.specs} or not writer.restore(record.sha256, late):
            break
        kept += 1
    log.rewrite(records[:kept])
    return [ErrorSum(record.error, record.signal) for record in records[:kept]]


def _return_free_memory() -> None:
    """Give the heap's free pages back to the system.

    Chunks of a few sizes come and go for hours; glibc keeps what they leave behind for itself, and the resident size
    would grow by some megabytes a tensor. Other C libraries have no such call and no such habit.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _write_companions(plan: Plan, source: Source, partial: PartialOutput) -> None:
    try:
        source.write_companions(partial.path)
        write_text(partial.path / "config.json", json.dumps(plan.config, indent=2) + "\n")
        section = plan.config.get("quantization_config", {})
        if section.get("quant_method") in FILES:
            write_text(partial.path / FILES[section["quant_method"]], json.dumps(section, indent=2) + "\n")
        if len(plan.shards) > 1:
            write_text(partial.path / INDEX, json.dumps(_index(plan, partial.path), indent=2) + "\n")
    except OSError as error:
        raise writing_failed(partial.path, error) from error


def _index(plan: Plan, folder: Path) -> dict[str, Any]:
    names = plan.shard_names()
    weight_map = {spec.name: name for name, shard in zip(names, plan.shards, strict=True) for spec in _specs(shard)}
    total = sum(_tensor_bytes(folder / name) for name in names)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _tensor_bytes(shard: Path) -> int:
    file = SafetensorsFile(shard)
    try:
        return sum(entry.nbytes for entry in file.entries.values())
    finally:
        file.close()


def planned_rows(plan: Plan) -> list[KindRow]:
    """The rows of a run that was only planned: sizes, no errors."""
    return _rows(plan, [ErrorSum() for _ in plan.steps])


def _rows(plan: Plan, results: list[ErrorSum]) -> list[KindRow]:
    groups: dict[tuple[str, str], list[tuple[Step, ErrorSum]]] = {}
    for step, result in zip(plan.steps, results, strict=True):
        groups.setdefault((step.kind, step.action), []).append((step, result))
    rows = []
    for (kind, action), members in groups.items():
        rows.append(
            KindRow(
                kind,
                action,
                len(members),
                sum(step.info.rows * step.info.row_numel for step, _ in members),
                sum(step.info.nbytes for step, _ in members),
                sum(step.nbytes for step, _ in members),
                sum(result.error for _, result in members),
                sum(result.signal for _, result in members),
                max(result.relative for _, result in members),
            )
        )
    return rows
