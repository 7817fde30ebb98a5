"""A pytest plugin: every case of the suite as a test of a third party's own run.

    pytest -p qcore_conformance.plugin --pyargs qcore_conformance --qcore-backend=acme

Ids are case ids, so ``-k gemm_4bit`` and ``-k "L1 and nf4"`` select. Cases run in pytest's own process, where ``--pdb``
and a sanitizer see them; a backend that crashes takes pytest with it, and ``qcore-conformance run`` is the one that
survives. Cases that expect trouble, such as those beside protected pages, run in a worker process here too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qcore.errors import BackendError
from qcore_conformance.model import LEVELS, Case, Outcome, Result

if TYPE_CHECKING:
    from qcore_conformance.runner import Target, Worker
    from qcore_conformance.session import Session

DEFAULT_LEVELS = ("L0", "L1", "L2")
# The file of the package whose node holds every case.
_HOME = Path(__file__).with_name("cases") / "__init__.py"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the suite."""
    group = parser.getgroup("qcore-conformance", "conformance of a qcore backend")
    group.addoption("--qcore-backend", metavar="NAME", help="backend to test: a name, a path or module:Class")
    group.addoption("--qcore-device", metavar="DEVICE", help="torch device (default: the backend's own)")
    group.addoption("--qcore-op", action="append", default=[], metavar="OP", help="only this op (repeatable)")
    group.addoption(
        "--qcore-level",
        action="append",
        default=[],
        choices=LEVELS,
        help="only this level (repeatable; default L0, L1, L2)",
    )
    group.addoption("--qcore-seed", type=int, default=0, help="seed of every random input (default 0)")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect the cases where pytest comes across the package."""
    if file_path != _HOME:
        return None
    return CaseFile.from_parent(parent, path=file_path)


def pytest_report_header(config: pytest.Config) -> str | None:
    """Name the backend under test."""
    name = config.getoption("--qcore-backend")
    return f"qcore-conformance: backend {name}, seed {config.getoption('--qcore-seed')}" if name else None


class CaseFile(pytest.File):
    """All selected cases, and the one session that they share."""

    def collect(self) -> Iterator[pytest.Item]:
        """Yield an item a case; ``UsageError`` for an unknown op, an empty selection or no backend."""
        from qcore_conformance import cases

        option = self.config.getoption
        if option("--qcore-backend") is None:
            raise pytest.UsageError("qcore-conformance: say which backend to test: --qcore-backend=NAME")
        unknown = sorted(set(option("--qcore-op")) - set(cases.OPS))
        if unknown:
            raise pytest.UsageError(f"qcore-conformance: unknown op {unknown[0]!r}; the ops are {', '.join(cases.OPS)}")
        chosen = cases.select(option("--qcore-op"), option("--qcore-level") or DEFAULT_LEVELS)
        if not chosen:
            raise pytest.UsageError("qcore-conformance: no case has these ops and levels; nothing would be checked")
        self._open()
        for case in chosen:
            yield CaseItem.from_parent(self, name=case.id, case=case)

    def _open(self) -> None:
        from qcore.backend import get_backend
        from qcore_conformance.runner import Target
        from qcore_conformance.session import Session

        option = self.config.getoption
        name, device, seed = option("--qcore-backend"), option("--qcore-device"), option("--qcore-seed")
        try:
            self.session_under_test: Session = Session(get_backend(name), device, seed, spec=name)
        except BackendError as error:
            raise pytest.UsageError(f"qcore-conformance: {error}") from error
        self.target: Target = Target(name, device, seed)
        self._worker: Worker | None = None

    def run_isolated(self, case: Case) -> Result:
        """Run a case in a worker process, which serves all such cases until one ends it."""
        from qcore_conformance.runner import Worker, WorkerDied, WorkerHung

        if self._worker is None:
            self._worker = Worker(self.target)
            self._worker.start()
        try:
            return self._worker.run(case)
        except (WorkerDied, WorkerHung) as error:
            self._worker = None
            outcome = Outcome.CRASHED if isinstance(error, WorkerDied) else Outcome.HUNG
            return Result(case.id, case.op, case.level, list(case.clauses), outcome, message=str(error))

    def teardown(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None


class CaseFailure(Exception):
    """A case failed; the text is the case's own message and the line that reproduces it."""


class CaseItem(pytest.Item):
    """One case."""

    parent: CaseFile

    def __init__(self, *, case: Case, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.case = case
        self.add_marker(case.level)
        self.add_marker(case.op)
        self.user_properties += [("clauses", " ".join(case.clauses))]

    def runtest(self) -> None:
        """Run the case; what did not run is skipped with its reason."""
        isolated = self.case.params.get("isolated")
        result = (self.parent.run_isolated if isolated else self.parent.session_under_test.run_case)(self.case)
        if result.worst is not None:
            self.user_properties.append(("worst_over_bound", result.worst))
        if result.outcome in (Outcome.NOT_RUN, Outcome.UNSUPPORTED):
            pytest.skip(f"{result.outcome.value}: {result.message}")
        if result.outcome is not Outcome.PASSED:
            raise CaseFailure(
                f"{result.outcome.value}: {result.message}\nclauses: {', '.join(result.clauses)}\n"
                f"reproduce: {self.parent.target.repro(self.case.id)}"
            )

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: object = None) -> str:  # type: ignore[override]
        """Show the message of a failed case without a traceback through the suite."""
        if isinstance(excinfo.value, CaseFailure):
            return str(excinfo.value)
        return str(super().repr_failure(excinfo))

    def reportinfo(self) -> tuple[Path, None, str]:
        """Name the case in reports."""
        return self.path, None, self.case.id


def pytest_configure(config: pytest.Config) -> None:
    """Register the marks that the cases carry, for ``--strict-markers``."""
    from qcore.backend import OPS

    for mark in (*LEVELS, *OPS, "contract"):
        config.addinivalue_line("markers", f"{mark}: cases of the qcore conformance suite")
