"""Runs the suite on every mutant, op by op, until a case notices it; and on the right backends, which must pass.

Cases that cite the broken clause come first, so that a kill usually has the right reason, and every case that noticed a
mutant then runs on the right backends: it convicts nobody if it fails one of them. Mutants that only compute wrongly
share worker processes; one that takes its process with it runs through the suite's own isolation.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from zlib import crc32

from qcore.backend import Backend, get_backend
from qcore.errors import InvalidArgument
from qcore_conformance.model import Case, Outcome, Result
from qcore_conformance.mutants.mutant import Mutant

# Right backends: the reference, the steps that mutants replace, and the wrapper that mutants of memory replace.
CONTROLS = (
    "qcore_cpu_reference:load",
    "qcore_conformance.mutants.steps:Steps",
    "qcore_conformance.mutants.memory:AnyOp",
)
# The library that mutants of the C ABI spoil.
NATIVE_CONTROL = "cpu"
# A worker that is only slow answers a single case well within this.
HANG_SECONDS = 10.0
# Cases that take a second and more on the reference, and those that take many; after all others of their clause.
_SLOW = ("/threads", "-every-pattern", "-lengths", "-n135283")
_SLOWEST = ("/two-threads", "/repeats-50")


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
    native: bool = False  # a library behind the C ABI
    control: str = ""  # what it spoils, where that is not NATIVE_CONTROL

    @property
    def killed(self) -> bool:
        return bool(self.case_id)


@dataclass(frozen=True)
class Control:
    """A right backend in one op: how many of the cases that noticed a mutant it passed, and the false alarms."""

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
        return [control for control in self.controls if control.alarms]

    @property
    def exit_code(self) -> int:
        """0, or 1 if a mutant survived or a right backend did not pass, or 2 if nothing was run."""
        if not self.rows:
            return 2
        return 1 if self.survivors or self.alarms else 0


@dataclass(frozen=True)
class _Job:
    spec: str  # module:attribute or path of the backend
    op: str
    seed: int
    clause: str
    expects: Outcome = Outcome.FAILED
    isolated: bool = False


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
    BackendUnavailable
        The mutants of the C ABI need a C compiler and the cpu backend.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="qcore-mutants-") as directory:
        matrix = _run(_chosen(mutants, Path(directory)), ops, seed, workers, progress)
    matrix.seconds = time.perf_counter() - start
    return matrix


def _chosen(names: Sequence[str], directory: Path) -> list[Mutant]:
    """The mutants of these names, or all; those of the C ABI are compiled."""
    from qcore_conformance.mutants import all_mutants, native

    python = {mutant.name: mutant for mutant in all_mutants()}
    compiled = native.names()
    for name in names:
        if name not in python and name not in compiled:
            near = get_close_matches(name, [*python, *compiled], n=1)
            raise InvalidArgument(f"no mutant {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    chosen = [mutant for mutant in python.values() if not names or mutant.name in names]
    wanted = tuple(name for name in compiled if not names or name in names)
    return chosen + (native.native_mutants(directory, wanted) if wanted else [])


def _run(
    chosen: Sequence[Mutant],
    ops: Sequence[str],
    seed: int,
    workers: int,
    progress: Callable[[int, int, Row | Control], None],
) -> Matrix:
    jobs = [
        (mutant, _Job(mutant.spec, op, seed, mutant.clause, mutant.expects, mutant.isolated))
        for mutant in chosen
        for op in mutant.ops
        if not ops or op in ops
    ]
    matrix = Matrix(seed)
    rows: dict[int, Row] = {}
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
    # Fresh processes: a forked one would inherit the thread pools of this one, without their threads.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        hunts = {pool.submit(_hunt, job): i for i, (_, job) in enumerate(jobs)}
        for done, future in enumerate(as_completed(hunts), start=1):
            mutant, job = jobs[hunts[future]]
            found = {**vars(future.result()), "native": mutant.native, "control": mutant.control}
            row = Row(mutant.name, mutant.says, job.clause, job.op, **found)
            rows[hunts[future]] = row
            progress(done, len(hunts), row)
        matrix.rows = [rows[index] for index in sorted(rows)]
        controls = [pool.submit(_control, spec, seed, cases) for spec, cases in _convicting(matrix.rows)]
        for done, control in enumerate(as_completed(controls), start=1):
            matrix.controls.append(control.result())
            progress(done, len(controls), matrix.controls[-1])
    known = (*CONTROLS, NATIVE_CONTROL)
    matrix.controls.sort(key=lambda c: (known.index(c.backend) if c.backend in known else len(known), c.op))
    return matrix


def _convicting(rows: Sequence[Row]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The cases that noticed a mutant, by op, with each right backend that has to pass them for a kill to count."""
    groups: dict[tuple[bool, str, str], dict[str, None]] = {}
    for row in rows:
        if row.killed:
            groups.setdefault((row.native, row.control, row.op), {})[row.case_id] = None
    for (native, control, _), cases in groups.items():
        for spec in (control or NATIVE_CONTROL,) if native else CONTROLS:
            yield spec, tuple(cases)


@dataclass(frozen=True)
class _Found:
    cases_run: int
    seconds: float
    case_id: str = ""
    level: str = ""
    outcome: str = ""
    message: str = ""
    cites: bool = False


def _hunt(job: _Job) -> _Found:
    """Run the cases of an op on a mutant, up to the first that notices it."""
    from qcore_conformance.cases import select

    def order(case: Case) -> tuple[bool, int, int]:
        """By clause, the cheap ones first; then at random but always the same, as neighbours in the list are alike."""
        cost = 2 if case.id.endswith(_SLOWEST) else int(case.id.endswith(_SLOW))
        return job.clause not in case.clauses, cost, crc32(case.id.encode())

    start, number = time.perf_counter(), 0
    # Stress only where the clause asks for it; a case that needs a process of its own says NOT_RUN in this one.
    cases = [case for case in select([job.op]) if case.level != "L3" or job.clause in case.clauses]
    seconds = HANG_SECONDS if job.expects is Outcome.HUNG else None
    with _opened(job.spec, job.seed, isolated=job.isolated, seconds=seconds) as run_case:
        for case in sorted(cases, key=order):
            result = run_case(case)
            number += 1
            # A mutant that takes its process with it is noticed only by a report that says so.
            if result.outcome is job.expects:
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


def _control(spec: str, seed: int, case_ids: Sequence[str]) -> Control:
    """Run cases of one op that noticed mutants on a right backend."""
    from qcore_conformance.cases import case_by_id

    cases = [case_by_id(case_id) for case_id in case_ids]
    passed, alarms = 0, []
    for isolated in (False, True):
        chosen = [case for case in cases if bool(case.params.get("isolated")) is isolated]
        if not chosen:
            continue
        with _opened(spec, seed, isolated=isolated) as run_case:
            for case in chosen:
                result = run_case(case)
                if result.outcome is Outcome.PASSED:
                    passed += 1
                else:
                    alarms.append(f"{case.id}: {result.outcome.value}: {result.message}")
    name = Path(spec).stem if spec.endswith(".so") else spec
    return Control(name, cases[0].op, passed, tuple(alarms))


@contextmanager
def _opened(
    spec: str, seed: int, *, isolated: bool, seconds: float | None = None
) -> Iterator[Callable[[Case], Result]]:
    """A function that runs a case on a backend, in this process or in a worker that is replaced when it ends."""
    if not isolated:
        from qcore_conformance.session import Session

        yield Session(_backend(spec), seed=seed, spec=spec).run_case
        return
    from qcore_conformance.runner import Target, Worker, WorkerDied, WorkerHung

    target = Target(spec, seed=seed, case_seconds=seconds)
    workers: list[Worker] = []

    def run_case(case: Case) -> Result:
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
        yield run_case
    finally:
        for worker in workers:
            worker.stop()


def _backend(spec: str) -> Backend:
    """A fresh backend where it is a class: the registry would keep one instance, and mutants have state."""
    if ":" not in spec:
        return get_backend(spec)
    module, _, attribute = spec.partition(":")
    backend: Backend = getattr(import_module(module), attribute)()
    return backend
