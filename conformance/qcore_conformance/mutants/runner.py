"""Runs the suite on every mutant, op by op, until a case notices it; and on the right backends, which must pass.

Cases that cite the broken clause come first, so that a kill usually has the right reason. Mutants that only compute
wrongly share worker processes; one that may take its process with it runs through the suite's own isolation.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from multiprocessing import get_context
from typing import Any
from zlib import crc32

from qcore.backend import Backend
from qcore.errors import InvalidArgument
from qcore_conformance.model import Case, Outcome, Result

# Right backends: the reference, the steps that mutants replace, and the wrapper that mutants of memory replace.
CONTROLS = (
    "qcore_cpu_reference:load",
    "qcore_conformance.mutants.steps:Steps",
    "qcore_conformance.mutants.memory:AnyOp",
)
# A worker that is only slow answers a single case well within this.
HANG_SECONDS = 10.0
KILLED = frozenset({Outcome.FAILED, Outcome.CRASHED, Outcome.HUNG})


@dataclass(frozen=True)
class Row:
    """One mutant in one op: the first case that noticed it, or none."""

    mutant: str
    says: str
    clause: str
    op: str
    cases_run: int
    seconds: float
    case_id: str = ""
    level: str = ""
    outcome: str = ""
    message: str = ""
    cites: bool = False  # whether that case cites the clause that the mutant breaks

    @property
    def killed(self) -> bool:
        return bool(self.case_id)


@dataclass(frozen=True)
class Control:
    """A right backend in one op: how many cases it passed, and the false alarms."""

    backend: str
    op: str
    passed: int
    alarms: tuple[str, ...]


@dataclass
class Matrix:
    """The kill matrix."""

    seed: int
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    controls: list[Control] = field(default_factory=list)

    @property
    def survivors(self) -> list[Row]:
        return [row for row in self.rows if not row.killed]

    @property
    def alarms(self) -> list[Control]:
        return [control for control in self.controls if control.alarms or not control.passed]

    @property
    def exit_code(self) -> int:
        """0, or 1 if a mutant survived or a right backend did not pass, or 2 if nothing was run."""
        if not self.rows:
            return 2
        return 1 if self.survivors or self.alarms else 0


@dataclass(frozen=True)
class _Job:
    spec: str  # module:attribute of the backend
    op: str
    seed: int
    clause: str = ""  # that a mutant breaks; none for a control


def run(
    mutants: Sequence[str] = (),
    ops: Sequence[str] = (),
    seed: int = 0,
    workers: int = 2,
    progress: Callable[[int, int, Row | Control], None] = lambda done, total, last: None,
) -> Matrix:
    """Run the suite on the mutants and the controls.

    Parameters
    ----------
    mutants, ops
        Names to run; all if empty.
    seed
        The seed of the suite's inputs.
    workers
        Number of worker processes.
    progress
        Called with the number of finished jobs, their total and the last result.

    Raises
    ------
    InvalidArgument
        There is no mutant of a name in ``mutants``.
    """
    from qcore_conformance.mutants import all_mutants

    known = {mutant.name: mutant for mutant in all_mutants()}
    for name in set(mutants) - set(known):
        near = get_close_matches(name, known, n=1)
        raise InvalidArgument(f"no mutant {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    chosen = [known[name] for name in mutants] if mutants else list(known.values())
    start = time.perf_counter()
    jobs = [
        (mutant, _Job(mutant.spec, op, seed, mutant.clause))
        for mutant in chosen
        for op in mutant.ops
        if not ops or op in ops
    ]
    wanted = list(dict.fromkeys(job.op for _, job in jobs))
    controls = [_Job(spec, op, seed) for spec in CONTROLS for op in wanted]
    matrix = Matrix(seed)
    rows: dict[int, Row] = {}
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
    # Fresh processes: a forked one would inherit the thread pools of this one, without their threads.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures: dict[Future[Any], int | None] = {pool.submit(_control, job): None for job in controls}
        for index, (mutant, job) in enumerate(jobs):
            futures[pool.submit(_hunt, job, mutant.expects)] = index
        for done, future in enumerate(as_completed(futures), start=1):
            place = futures[future]
            if place is None:
                last = future.result()
                matrix.controls.append(last)
            else:
                mutant, job = jobs[place]
                last = rows[place] = _row(mutant.name, mutant.says, job, future.result())
            progress(done, len(futures), last)
    matrix.rows = [rows[index] for index in sorted(rows)]
    matrix.controls.sort(key=lambda control: (CONTROLS.index(control.backend), wanted.index(control.op)))
    matrix.seconds = time.perf_counter() - start
    return matrix


@dataclass(frozen=True)
class _Found:
    cases_run: int
    seconds: float
    case_id: str = ""
    level: str = ""
    outcome: str = ""
    message: str = ""
    cites: bool = False


def _hunt(job: _Job, expects: Outcome) -> _Found:
    """Run the cases of an op on a mutant, up to the first that notices it."""
    start = time.perf_counter()
    number = 0
    with _results(job, expects) as results:
        for case, result in results:
            number += 1
            # A mutant that takes its process with it is noticed only by a report that says so.
            if result.outcome is expects:
                return _Found(
                    number,
                    time.perf_counter() - start,
                    case.id,
                    case.level,
                    result.outcome.value,
                    result.message,
                    job.clause in case.clauses,
                )
    return _Found(number, time.perf_counter() - start)


@contextmanager
def _results(job: _Job, expects: Outcome) -> Iterator[Iterator[tuple[Case, Result]]]:
    """The cases of a job with their results, one by one, in this process or in a worker of its own."""
    from qcore_conformance.cases import select

    def order(case: Case) -> tuple[bool, bool, int]:
        """By clause, the cheap ones first; then at random but always the same, as neighbours in the list are alike."""
        return job.clause not in case.clauses, case.id.endswith("/threads"), crc32(case.id.encode())

    # Stress only where the clause asks for it; a case that needs a process of its own says NOT_RUN in this one.
    cases = [case for case in select([job.op]) if case.level != "L3" or job.clause in case.clauses]
    cases.sort(key=order)
    if expects is Outcome.FAILED:
        from qcore_conformance.session import Session

        session = Session(_backend(job.spec), seed=job.seed, spec=job.spec)
        yield ((case, session.run_case(case)) for case in cases)
        return
    from qcore_conformance.runner import Target, Worker, WorkerDied, WorkerHung

    target = Target(job.spec, seed=job.seed, case_seconds=HANG_SECONDS if expects is Outcome.HUNG else None)
    workers: list[Worker] = []

    def run(case: Case) -> Result:
        if not workers:
            workers.append(Worker(target))
            workers[0].start()
        try:
            return workers[0].run(case)
        except (WorkerDied, WorkerHung) as error:
            workers.pop().stop()
            outcome = Outcome.CRASHED if isinstance(error, WorkerDied) else Outcome.HUNG
            return Result(case.id, case.op, case.level, list(case.clauses), outcome, message=str(error))

    try:
        yield ((case, run(case)) for case in cases)
    finally:
        for worker in workers:
            worker.stop()


def _control(job: _Job) -> Control:
    """Run every case of an op on a right backend."""
    passed, alarms = 0, []
    with _results(job, Outcome.FAILED) as results:
        for case, result in results:
            passed += result.outcome is Outcome.PASSED
            if result.outcome in KILLED:
                alarms.append(f"{case.id}: {result.message}")
    return Control(job.spec, job.op, passed, tuple(alarms))


def _backend(spec: str) -> Backend:
    """A fresh backend: the registry would keep one instance, and mutants have state."""
    module, _, attribute = spec.partition(":")
    backend: Backend = getattr(import_module(module), attribute)()
    return backend


def _row(mutant: str, says: str, job: _Job, found: _Found) -> Row:
    return Row(mutant=mutant, says=says, clause=job.clause, op=job.op, **vars(found))
