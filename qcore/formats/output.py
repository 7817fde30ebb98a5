"""The output folder while it is being made: a temporary name, a journal, a lock, and one rename at the end.

``OUT.partial`` holds finished shards, perhaps an unfinished one with its log (``step_log.py``), and ``journal.json``,
which says which arguments and which source files they were made from and the SHA-256 of every tensor in the finished
ones. The same command finds it, verifies what is there and goes on with the next tensor. ``OUT`` appears, or is
replaced, only when everything in it has been written and read back.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qcore.errors import OutputError
from qcore.formats.step_log import StepLog, log_path

_JOURNAL = "journal.json"
_VERSION = 1
# Beyond the tensors: configuration, tokenizer, journal.
_SPARE_BYTES = 64 << 20


def writing_failed(path: Path, error: OSError) -> OutputError:
    """Say what could not be written, and what to do."""
    advice = {
        errno.ENOSPC: "free some space and run the same command again: what is written is kept",
        errno.EDQUOT: "the quota is used up; free some space and run the same command again",
        errno.EACCES: "choose another output folder, or change its permissions",
        errno.EPERM: "choose another output folder, or change its permissions",
        errno.EROFS: "the file system is read-only; choose another output folder",
    }.get(error.errno or 0, "nothing that existed before was changed")
    return OutputError(f"{path}: cannot be written: {error.strerror or error}; {advice}")


def check_target(out: Path, source: Path, force: bool) -> None:
    """Refuse an output that would destroy something, before anything is written.

    Raises
    ------
    OutputError
        ``out`` exists and ``force`` is off, or it is no model folder; or it is the source; or its parent is missing.
    """
    out_real, source_real = out.resolve(), source.resolve()
    if out_real == source_real or out_real in source_real.parents or source_real in out_real.parents:
        raise OutputError(f"{out}: is, contains or lies inside the source {source}; choose another output folder")
    if not out_real.parent.is_dir():
        there = "is a file; choose another place" if out_real.parent.exists() else "does not exist; make it first"
        raise OutputError(f"{out}: the folder {out_real.parent} {there}")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise OutputError(f"{out}: exists and is not a folder")
    if not force:
        raise OutputError(f"{out}: exists; choose another name, or pass --force to replace it when the new one is done")
    if not (out / "config.json").is_file():
        raise OutputError(f"{out}: exists and holds no model (no config.json); --force does not replace it")


class PartialOutput:
    """``OUT.partial``, locked against a second run. Use :func:`open_partial`."""

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.out = out
        self.path = partial_path(out)
        self._identity = identity
        self._shards: dict[str, dict[str, Any]] = {}

    def load(self) -> bool:
        """Take over an earlier run's journal; ``False`` if there is none. ``OutputError`` if it is another run's."""
        try:
            journal = json.loads((self.path / _JOURNAL).read_text(encoding="utf-8"))
            version, identity, shards = journal["version"], journal["identity"], journal["shards"]
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError):
            raise OutputError(f"{self.path}: its journal is damaged; pass --restart to begin again") from None
        if version != _VERSION:
            raise OutputError(f"{self.path}: was begun by another version of qcore; pass --restart to begin again")
        different = _differences(identity, self._identity)
        if different:
            raise OutputError(
                f"{self.path}: was begun by a run that differs in {', '.join(different)}; "
                "finish it with the same arguments, or pass --restart to begin again"
            )
        self._shards = shards
        return True

    def clear(self) -> None:
        """Remove everything in the folder."""
        for item in self.path.iterdir():
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item)
            else:
                item.unlink()
        self._shards = {}

    def finished(self, shard: str) -> dict[str, Any] | None:
        """What :meth:`record` was given for ``shard``, if it was."""
        return self._shards.get(shard)

    def record(self, shard: str, result: dict[str, Any]) -> None:
        """Note in the journal that ``shard`` is complete and verified."""
        self._shards[shard] = result
        self._write_journal()
        self.steps(shard).remove()

    def steps(self, shard: str) -> StepLog:
        """The log of ``shard`` while it is unfinished."""
        return StepLog(self.path / shard)

    def forget(self, shard: str) -> None:
        """Take ``shard`` out of the journal."""
        self._shards.pop(shard, None)

    def _write_journal(self) -> None:
        text = json.dumps({"version": _VERSION, "identity": self._identity, "shards": self._shards})
        write_text(self.path / _JOURNAL, text)

    def begin(self) -> None:
        """Write the journal and remove what an interrupted run left half-written, but for a shard that has a log."""
        files = {item for item in self.path.iterdir() if item.is_file()}
        kept = {self.path / name for name in (_JOURNAL, *self._shards)}
        unfinished = {item for item in files - kept if log_path(item) in files}
        for item in files - kept - unfinished - {log_path(item) for item in unfinished}:
            item.unlink()
        self._write_journal()

    def commit(self, replaced: str) -> None:
        """Rename the folder to its final name; an older one is kept as ``replaced`` until that has worked."""
        (self.path / _JOURNAL).unlink()
        _sync_folder(self.path)
        old = self.out.with_name(replaced)
        keeps_old = self.out.exists() and any(self.out.iterdir())
        try:
            if keeps_old:
                os.rename(self.out, old)
            os.rename(self.path, self.out)
        except BaseException:  # a signal between the two, too
            if old.exists() and not self.out.exists():
                os.rename(old, self.out)
            raise
        _sync_folder(self.out.resolve().parent)
        if keeps_old:
            shutil.rmtree(old)


def partial_path(out: Path) -> Path:
    """Where the output is while it is incomplete."""
    return out.with_name(out.name + ".partial")


@contextmanager
def open_partial(out: Path, identity: dict[str, Any], *, restart: bool, nbytes: int) -> Iterator[PartialOutput]:
    """Make or take over ``OUT.partial``.

    Parameters
    ----------
    identity
        JSON values that a run must share with the one that it continues.
    restart
        Remove what an earlier run left.
    nbytes
        Bytes that the whole output takes; refused at once where the disk has less left.

    Raises
    ------
    OutputError
        Not writable, not enough space, in use by another run, or left by a different run.
    """
    import fcntl

    partial = PartialOutput(out, identity)
    try:
        partial.path.mkdir(exist_ok=True)
        handle = os.open(partial.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise writing_failed(partial.path, error) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{partial.path}: another run is writing it; wait for it to end") from None
        try:
            if restart or not partial.load():
                partial.clear()
            _check_space(partial.path, nbytes)
            partial.begin()
            yield partial
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise writing_failed(partial.path, error) from error
    finally:
        os.close(handle)


def _check_space(path: Path, nbytes: int) -> None:
    there = sum(item.stat().st_size for item in path.iterdir() if item.is_file())
    free = shutil.disk_usage(path).free
    need = nbytes - there + min(_SPARE_BYTES, nbytes)
    if need > free:
        raise OutputError(
            f"{path}: {need:,} more bytes are needed, the disk has {free:,}; free some, or write elsewhere"
        )


def _differences(old: Any, new: dict[str, Any]) -> list[str]:
    """Names of the arguments that differ, for a message."""
    if not isinstance(old, dict):
        return ["everything"]
    names = []
    for key in sorted({*old, *new}):
        before, now = old.get(key), new.get(key)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            names += [f"{k} ({before.get(k)!r}, now {now.get(k)!r})" for k in now if before.get(k) != now[k]]
        else:
            names.append(key)
    return names


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is either the old one or the new one, whatever happens."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
