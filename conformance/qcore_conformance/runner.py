"""Running cases in worker processes: a crash or a hang is a result, and the run goes on with the rest.

A worker is forked from a process that has imported what it needs, so that a new one after a crash costs milliseconds.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import selectors
import shlex
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from qcore.errors import BackendNotFound, BackendUnavailable
from qcore_conformance import SPEC_VERSION
from qcore_conformance.cases import all_cases
from qcore_conformance.forkserver import SERVER
from qcore_conformance.model import REQUIRED_LEVELS, SCHEMA, Case, Outcome, Report, Result

START_SECONDS = 180.0
# Enough for a loaded machine; a stress case moves gigabytes.
CASE_SECONDS = {"L0": 120.0, "L1": 120.0, "L2": 120.0, "L3": 1800.0}
_TAIL = 2500


@dataclass(frozen=True)
class Target:
    """What is tested and how: the backend as the user wrote it, the device, the seed."""

    backend: str
    device: str | None = None
    seed: int = 0
    case_seconds: float | None = None  # overrides CASE_SECONDS

    def repro(self, case_id: str) -> str:
        """The command line that runs one case alone."""
        words = ["qcore-conformance", "repro", case_id, "--backend", self.backend]
        if self.device is not None:
            words += ["--device", self.device]
        return shlex.join([*words, "--seed", str(self.seed)])

    def limit(self, case: Case) -> float:
        return self.case_seconds if self.case_seconds is not None else CASE_SECONDS[case.level]


class WorkerDied(Exception):
    """The worker process ended instead of answering; the message says how."""


class WorkerHung(Exception):
    """The worker did not answer in time and was killed."""


class Worker:
    """One worker process. Raises a ``BackendError`` from ``start`` if the backend cannot be had."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._pid: int | None = None
        self._commands = self._replies = -1
        self._buffer = b""
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        self.ready: dict[str, Any] = {}

    def start(self) -> None:
        (theirs_in, self._commands), (self._replies, theirs_out) = os.pipe(), os.pipe()
        self._pid = SERVER.fork(theirs_in, theirs_out, self._stderr.fileno())
        for descriptor in (theirs_in, theirs_out):
            os.close(descriptor)
        target = self._target
        asked = {"backend": target.backend, "device": target.device, "seed": target.seed}
        self._say(asked | {"folder": os.getcwd(), "environment": dict(os.environ)})
        try:
            answer = self._read(START_SECONDS)
        except (WorkerDied, WorkerHung) as error:
            raise BackendUnavailable(f"backend {target.backend!r}: while it was loaded, {error}") from error
        if "error" in answer:
            self.stop()
            kind = BackendNotFound if answer["error"]["kind"] == "BackendNotFound" else BackendUnavailable
            raise kind(answer["error"]["text"])
        self.ready = answer["ready"]

    def run(self, case: Case) -> Result:
        """Run one case; raises ``WorkerDied`` or ``WorkerHung``."""
        self._say({"case": case.id})
        answer = self._read(self._target.limit(case))["result"]
        return Result(**(answer | {"outcome": Outcome(answer["outcome"])}))

    def stop(self) -> None:
        if self._pid is None:
            return
        os.killpg(self._pid, signal.SIGKILL)
        self._buried()
        self._stderr.close()

    def _buried(self) -> int:
        """Wait for the end of the worker and close what belonged to it."""
        assert self._pid is not None
        code, self._pid = SERVER.wait(self._pid), None
        for descriptor in (self._commands, self._replies):
            os.close(descriptor)
        return code

    def _say(self, message: Mapping[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):  # it died after its last answer; reading says how
            while line:
                line = line[os.write(self._commands, line) :]

    def _read(self, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._replies, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, end - time.monotonic())):
                    self.stop()
                    raise WorkerHung(f"no answer within {seconds:g} s; the worker was killed")
                data = os.read(self._replies, 1 << 16)
                if not data:
                    raise WorkerDied(self._epitaph())
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _epitaph(self) -> str:
        code = self._buried()
        how = f"the worker exited with code {code}"
        if code < 0:
            how = f"the worker was killed by {signal.Signals(-code).name}"
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").splitlines()
        self._stderr.close()
        # Python's own report of a crash ends with a list of every extension module.
        tail = "\n".join(line for line in lines if not line.startswith("Extension modules:"))[-_TAIL:].strip()
        return f"{how}; its last words:\n{tail}" if tail else f"{how} without a word"


@dataclass
class _Run:
    """What the threads of one run share."""

    target: Target
    groups: queue.SimpleQueue[list[Case]]
    on_result: Callable[[Result], None]
    end: float = math.inf  # of time.monotonic(), after which no case is begun
    ready: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    errors: list[BaseException] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def record(self, result: Result) -> None:
        if result.outcome not in (Outcome.PASSED, Outcome.UNSUPPORTED, Outcome.NOT_RUN):
            result.repro = self.target.repro(result.case_id)
        with self.lock:
            self.results[result.case_id] = result
            self.on_result(result)

    def serve(self) -> None:
        """One thread: a worker of its own, fed with groups until none is left."""
        worker: Worker | None = None
        try:
            for case in self._cases():
                worker = worker or self._started()
                start = time.monotonic()
                try:
                    result = worker.run(case)
                except (WorkerDied, WorkerHung) as error:
                    worker = None
                    outcome = Outcome.CRASHED if isinstance(error, WorkerDied) else Outcome.HUNG
                    seconds = time.monotonic() - start
                    result = Result(
                        case.id, case.op, case.level, list(case.clauses), outcome, seconds, message=str(error)
                    )
                self.record(result)
        except BaseException as error:  # handed to the caller's thread
            self.errors.append(error)
            self.stopping.set()
        finally:
            if worker is not None:
                worker.stop()

    def _started(self) -> Worker:
        worker = Worker(self.target)
        worker.start()
        with self.lock:
            self.ready = self.ready or worker.ready
        return worker

    def _cases(self) -> Iterator[Case]:
        while not self.stopping.is_set():
            try:
                group = self.groups.get_nowait()
            except queue.Empty:
                return
            for case in group:
                if self.stopping.is_set() or (self.results and time.monotonic() > self.end):
                    return
                yield case


def _groups(cases: Sequence[Case]) -> list[list[Case]]:
    """Cases of one op and level stay together; a large group is split, so that workers end at the same time."""
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.op, case.level), []).append(case)
    return [group[i : i + 40] for group in groups.values() for i in range(0, len(group), 40)]


def _is_complete(selected: Sequence[Case]) -> bool:
    """Whether these are at least the cases that make a backend conformant."""
    required = {case.id for case in all_cases() if case.level in REQUIRED_LEVELS}
    return required <= {case.id for case in selected}


def run_cases(
    target: Target,
    cases: Sequence[Case],
    *,
    jobs: int = 1,
    on_result: Callable[[Result], None] = lambda result: None,
    selection: dict[str, Any] | None = None,
    budget: float = math.inf,
) -> Report:
    """Run ``cases`` in worker processes.

    Parameters
    ----------
    target : Target
    cases : sequence of Case
    jobs : int
        Number of workers.
    on_result : callable
        Called with each result as it comes, from any thread, one at a time.
    selection : dict, optional
        What was asked for, for the report.
    budget : float
        Seconds after which no further case is begun; those that are left count as not run, and the run as partial.

    Raises
    ------
    BackendNotFound, BackendUnavailable
        The backend cannot be had; no case has run.
    """
    started, start = datetime.now(timezone.utc), time.monotonic()
    groups: queue.SimpleQueue[list[Case]] = queue.SimpleQueue()
    for group in _groups(cases):
        groups.put(group)
    run = _Run(target, groups, on_result, start + budget)
    threads = [threading.Thread(target=run.serve) for _ in range(max(1, min(jobs, len(cases))))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        run.stopping.set()  # workers finish the case they are at, or are killed at its limit
        raise
    for error in run.errors:
        raise error
    left = [case for case in cases if case.id not in run.results]
    for case in left:
        why = f"the run's {budget:.0f} s were over"
        run.record(Result(case.id, case.op, case.level, list(case.clauses), Outcome.NOT_RUN, 0.0, message=why))
    return Report(
        schema=SCHEMA,
        spec_version=SPEC_VERSION,
        started=started.isoformat(timespec="seconds"),
        seconds=time.monotonic() - start,
        seed=target.seed,
        selection=selection or {"backend": target.backend},
        complete=_is_complete(cases) and not left,
        backend=run.ready["backend"],
        environment=run.ready["environment"],
        results=[run.results[case.id] for case in cases],
    )
