"""The backend as a whole: what it says of itself, its table, and empty tensors."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

from qcore_conformance.bounds import GemmDeclaration
from qcore_conformance.model import Case, NotRun
from qcore_conformance.samples import OPS, Sizes, samples
from qcore_conformance.session import Session

_EMPTY = Sizes((0,), ((0, 7), (7, 0), (0, 0)), ((0, 3, 64), (3, 0, 64), (3, 4, 0), (0, 0, 0)))


def _description(s: Session) -> None:
    """Name, device and architecture are said, and ops and declarations can be published as JSON."""
    said = s.description
    for field in ("name", "device", "arch"):
        assert isinstance(getattr(said, field), str), f"describe(): {field} is {getattr(said, field)!r}, expected text"
        assert getattr(said, field), f"describe(): {field} is empty"
    json.dumps({"ops": dict(said.ops), "declarations": dict(said.declarations)}, allow_nan=False)
    assert s.device.type in s.backend.device_types or "*" in s.backend.device_types
    again = s.backend.describe(s.device)
    assert again == said, "describe() gives another answer the second time"
    if said.abi:
        assert len(said.library_sha256) == 64, f"library_sha256 is {said.library_sha256!r}"


def _ops(s: Session) -> None:
    """``describe().ops`` and ``supports()`` agree, and the versions are those of this spec."""
    from qcore.backend import OPS as KNOWN

    supported = {op: version for op, version in KNOWN.items() if s.backend.supports(op)}
    assert supported, "the backend supports no op at all"
    said = dict(s.description.ops)
    assert said == supported, f"describe().ops is {said}, supports() and the spec say {supported}"


def _unsupported(s: Session) -> None:
    """An op that is left out raises ``Unsupported`` and writes nothing."""
    from qcore.errors import Unsupported

    missing = [op for op in OPS if not s.backend.supports(op)]
    if not missing:
        raise NotRun("the backend serves every op")
    for op in missing:
        sample = next(samples(op, s.rng, "f32", Sizes((65,), ((3, 5),), ((2, 3, 64),))))
        message = ""
        try:
            sample(s)
        except Unsupported as error:
            message = str(error)
        assert message, f"supports({op!r}) is False, but the call went through"
        assert op in message, f"the message does not name {op}: {message}"


def _declarations(s: Session) -> None:
    products = [op for op in ("gemm_4bit", "gemm_int4") if s.backend.supports(op)]
    if not products:
        raise NotRun("the backend serves neither gemm_4bit nor gemm_int4")
    for op in products:
        GemmDeclaration.parse(s.description.declarations, op)
    for op in s.description.declarations:
        assert op in OPS, f"a declaration about {op!r}, which is no op"


def _library(run: Callable[[Session, Any], None]) -> Callable[[Session], None]:
    def with_library(s: Session) -> None:
        from qcore_conformance import capi

        run(s, capi.Library(s))

    return with_library


def _table(s: Session, library: Any) -> None:
    api, ffi, qc = library.api, library.ffi, library.qc
    assert api.abi_major == qc.QC_ABI_MAJOR, f"abi_major is {api.abi_major}"
    assert s.description.abi == f"{api.abi_major}.{api.abi_minor}"
    assert api.size % ffi.alignof("qc_api") == 0, f"size is {api.size}"
    assert api.name != ffi.NULL, "the table has no name"
    assert library.handle.qcore_backend_open(qc.QC_ABI_MAJOR + 98) == ffi.NULL, "qcore_backend_open(99) gave a table"
    assert library.handle.qcore_backend_open(qc.QC_ABI_MAJOR) == api, "a second qcore_backend_open gave another table"
    for entry in ("last_error", "device_count", "describe", "workspace"):
        assert getattr(api, entry) != ffi.NULL, f"the table's {entry} is NULL; only ops may be left out"


def _describe(s: Session, library: Any) -> None:
    """The JSON is UTF-8, an object, complete, and stays where it is; a device that is not there is refused."""
    text = library.ffi.new("const char **")
    count = library.ffi.new("int32_t *", -1)
    assert library.api.device_count(count) == 0, f"device_count: {library.last_error()}"
    assert count[0] >= 1, f"device_count says {count[0]} devices"
    assert library.api.describe(0, text) == 0, f"describe(0): {library.last_error()}"
    first = text[0]
    said = json.loads(library.ffi.string(first).decode("utf-8"))
    for key in ("name", "arch", "driver", "runtime", "torch_device", "declarations"):
        assert key in said, f"describe(0) has no {key!r}: {said}"
    assert library.api.describe(0, text) == 0
    assert library.ffi.string(text[0]) == library.ffi.string(first), "describe(0) changed its answer"
    for index in (-1, count[0], 10_000):
        status = library.api.describe(index, text)
        assert status in (library.qc.QC_INVALID_ARGUMENT, library.qc.QC_NO_DEVICE), (
            f"describe({index}): status {status}"
        )
        assert library.last_error(), f"describe({index}) failed without a message"


def _last_error_is_thread_local(s: Session, library: Any) -> None:
    text = library.ffi.new("const char **")
    assert library.api.describe(-1, text) != 0
    mine = library.last_error()
    theirs: list[str] = []
    thread = threading.Thread(target=lambda: theirs.append(library.last_error()))
    thread.start()
    thread.join()
    assert theirs == [""], f"another thread sees the error of this one: {theirs}"
    assert library.last_error() == mine, "the error text changed although no call was made on this thread"


def _workspace(s: Session, library: Any) -> None:
    """Sizes are not negative, and unknown ops and negative counts are refused."""
    count = library.ffi.new("int64_t *")
    for index, op in enumerate(OPS):
        assert getattr(library.qc, f"QC_OP_{op.upper()}") == index
        for sizes in ((0, 0, 0), (1, 4096, 4096), (70, 129, 1000)):
            status = library.api.workspace(index, *library.where(), 0, *sizes, count)
            if status == library.qc.QC_UNSUPPORTED and not s.backend.supports(op):
                continue
            assert status == 0, f"workspace({op}, {sizes}): status {status}: {library.last_error()}"
            assert count[0] >= 0, f"workspace({op}, {sizes}) says {count[0]} bytes"
    for op_index, sizes in ((-1, (1, 1, 1)), (len(OPS) + 1000, (1, 1, 1)), (0, (-1, 1, 1))):
        status = library.api.workspace(op_index, *library.where(), 0, *sizes, count)
        assert status == library.qc.QC_INVALID_ARGUMENT, f"workspace({op_index}, {sizes}): status {status}"


def _empty(op: str) -> Callable[[Session], None]:
    """No elements: no error, nothing written outside what there is (QC-NUM-005); addresses may be 0."""

    def run(s: Session) -> None:
        for dtype in ("f32", "f16", "bf16"):
            for sample in samples(op, s.rng, dtype, _EMPTY):
                sample(s)

    return run


def cases() -> Iterator[Case]:
    for name, clauses, run in (
        ("description", ("QC-NUM-005",), _description),
        ("ops", ("QC-NUM-005",), _ops),
        ("unsupported-ops", ("QC-NUM-006",), _unsupported),
        ("declarations", ("QC-GEMM4-002", "QC-INT4-004"), _declarations),
        ("abi-table", ("QC-NUM-005",), _library(_table)),
        ("abi-describe", ("QC-NUM-006",), _library(_describe)),
        ("abi-last-error-per-thread", ("QC-NUM-006",), _library(_last_error_is_thread_local)),
        ("abi-workspace", ("QC-NUM-005", "QC-NUM-006"), _library(_workspace)),
    ):
        yield Case(f"contract/L0/{name}", "contract", "L0", clauses, run)
    for op in OPS:
        yield Case(f"{op}/L0/empty", op, "L0", ("QC-NUM-005",), _empty(op))
