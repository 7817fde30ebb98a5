"""A library built against ABI 1.0 loads for ever, and a library that cannot be used says why."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cffi
import pytest
import torch

from qcore import codebooks
from qcore.backend import abi, cffi_backend
from qcore.backend.cffi_backend import CffiBackend
from qcore.backend.registry import backend_for, get_backend, use_backend
from qcore.errors import BackendUnavailable, Unsupported

FROZEN = Path(__file__).parent / "v1_0"
FROZEN_HEADER = FROZEN / "qcore_backend_v1_0.h"
FROZEN_SHA256 = "aaba6764043e2619cf946fb954e2cd738d8a287e3460438ff7c1f8919a469abb"

Build = Callable[..., Path]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compile the frozen backend with ``-D`` definitions; returns the library."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        if os.environ.get("QCORE_REQUIRE_NATIVE") == "1":
            pytest.fail("no C compiler (cc, gcc, clang) was found")
        pytest.skip("no C compiler (cc, gcc, clang) was found")
    folder = tmp_path_factory.mktemp("abi")

    def compile_frozen(*definitions: str) -> Path:
        library = folder / f"lib{len(list(folder.iterdir()))}.so"
        options = ["-std=c11", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
        flags = [f"-D{definition}" for definition in definitions]
        command = [compiler, *options, *flags, f"-I{FROZEN}", "-o", str(library), str(FROZEN / "backend.c")]
        if "EXPORTS_NOTHING" not in definitions:
            command.insert(1, "-Wmissing-declarations")
        subprocess.run(command, check=True)
        return library

    return compile_frozen


def pre_parsed(folder: Path) -> Any:
    """The current header as a wheel's build parses it."""
    path = abi.generate(folder)
    module = ModuleType("_abi")
    exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    return module.ffi


@pytest.fixture(params=["parsed at import", "parsed at build"], autouse=True)
def ffi(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways in which qcore reads its header: a missing symbol is another exception in each."""
    ffi = parsed(abi.HEADER.read_text()) if "import" in request.param else pre_parsed(tmp_path)
    use_ffi(monkeypatch, ffi)


def use_ffi(monkeypatch: pytest.MonkeyPatch, ffi: Any) -> None:
    monkeypatch.setattr(cffi_backend, "ffi", ffi)
    monkeypatch.setattr(cffi_backend, "QC", ffi.dlopen(None))


def parsed(header: str) -> cffi.FFI:
    ffi = cffi.FFI()
    ffi.cdef(abi.declarations(header))
    return ffi


def next_minor(header: str) -> str:
    """The header as a later 1.x would have it: one more entry at the end of the table."""
    grown = header.replace("} qc_api;", "    qc_status (*later_op)(int32_t device, uintptr_t stream);\n} qc_api;")
    return grown.replace("#define QC_ABI_MINOR 3", "#define QC_ABI_MINOR 4")


def check_ops(backend: CffiBackend) -> None:
    """Both ops of the frozen backend give what the spec says; the others are unsupported."""
    code = torch.tensor(codebooks.DYNAMIC)
    codes = torch.arange(100, dtype=torch.uint8)
    absmax = torch.tensor([2.0, 0.5])
    values = torch.empty(100)
    backend.dequantize_blockwise(codes, absmax, code, 64, out=values)
    assert torch.equal(values, code[:100] * absmax.repeat_interleave(64)[:100])

    rows = torch.tensor([[127, -127, 3], [1, 0, -1]], dtype=torch.int8)
    stats = torch.tensor([2.0, 8.0])
    out = torch.empty(2, 3)
    backend.int8_dequantize_rows(rows, stats, out=out)
    assert torch.equal(out, (rows.float() * stats[:, None]) * torch.tensor(float.fromhex("0x1.020408p-7")))

    served = set(backend.describe(torch.device("cpu")).ops)
    assert served == {"dequantize_blockwise", "int8_dequantize_rows"}
    with pytest.raises(Unsupported, match="int8_gemm"):
        backend.int8_gemm(rows, rows, out=torch.empty(2, 2, dtype=torch.int32))


def test_the_frozen_header_is_frozen() -> None:
    assert hashlib.sha256(FROZEN_HEADER.read_bytes()).hexdigest() == FROZEN_SHA256


def test_the_current_table_starts_with_the_frozen_one() -> None:
    frozen, current = parsed(FROZEN_HEADER.read_text()), parsed(abi.HEADER.read_text())
    for struct in ("qc_api", "qc_weight_4bit"):
        old, new = frozen.typeof(struct).fields, current.typeof(struct).fields
        assert [(name, field.offset, field.type.cname) for name, field in old] == [
            (name, field.offset, field.type.cname) for name, field in new[: len(old)]
        ]
    # A kept struct must not grow either: libraries of 1.0 read it at its size of then.
    assert frozen.sizeof("qc_weight_4bit") == current.sizeof("qc_weight_4bit")


def test_no_constant_of_the_frozen_header_has_changed() -> None:
    frozen, current = parsed(FROZEN_HEADER.read_text()).dlopen(None), parsed(abi.HEADER.read_text()).dlopen(None)
    names = [name for name in dir(frozen) if name.startswith("QC_") and name != "QC_ABI_MINOR"]
    assert len(names) > 20
    assert {name: getattr(frozen, name) for name in names} == {name: getattr(current, name) for name in names}


def test_a_library_of_1_0_loads_and_runs(build: Build) -> None:
    backend = CffiBackend("frozen", build())
    check_ops(backend)
    assert backend.describe(torch.device("cpu")).abi == "1.0"
    assert backend.device_types == {"cpu"}
    with pytest.raises(Unsupported, match="float32 only"):
        backend.dequantize_blockwise(
            torch.zeros(1, dtype=torch.uint8), torch.ones(1), torch.zeros(256), 64, out=torch.empty(1).half()
        )


def test_a_library_of_1_0_loads_under_a_later_minor(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    later = parsed(next_minor(abi.HEADER.read_text()))
    assert later.sizeof("qc_api") == abi.ffi.sizeof("qc_api") + 8
    use_ffi(monkeypatch, later)
    check_ops(CffiBackend("frozen", build()))


def test_an_older_shorter_table_leaves_its_missing_ops_out(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    later = parsed(next_minor(abi.HEADER.read_text()))
    use_ffi(monkeypatch, later)
    backend = CffiBackend("short", build("TABLE_SIZE=offsetof(qc_api,int8_dequantize_rows)"))
    assert backend.supports("dequantize_blockwise")
    # The entry stands behind the end of the table: it must not be read, although there is a function.
    assert not backend.supports("int8_dequantize_rows")


def test_a_newer_longer_table_loads(build: Build) -> None:
    check_ops(CffiBackend("newer", build("TABLE_MINOR=7", "TABLE_SIZE=sizeof(qc_api)+64")))


def test_a_library_is_selected_by_its_path(build: Build) -> None:
    library = build()
    with use_backend(str(library)):
        assert backend_for("cpu") is get_backend(str(library))


@pytest.mark.parametrize(
    ("definitions", "message"),
    [
        # It says that it is of our minor, but its table ends where that of 1.0 did.
        ([f"TABLE_MINOR={abi.constants.QC_ABI_MINOR}"], rf"1\.{abi.constants.QC_ABI_MINOR} has a table of .* bytes"),
        (["TABLE_SIZE=16"], "16 bytes"),
        (["TABLE_MAJOR=2"], r"ABI 2\.0.*needs 1"),
        (["OPENS_NOTHING"], "does not serve ABI 1"),
        (["EXPORTS_NOTHING"], "qcore_backend_open"),
        (["NO_DEVICE"], "no frozen device in this machine"),
        (['DESCRIPTION="not JSON"'], "describe"),
        (['DESCRIPTION="[1]"'], "describe"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, list) else "",
)
def test_a_library_that_cannot_be_used_says_why(build: Build, definitions: list[str], message: str) -> None:
    library = build(*definitions)
    with pytest.raises(BackendUnavailable, match=message) as error:
        CffiBackend("acme", library)
    assert "acme" in str(error.value)
    assert str(library) in str(error.value)


@pytest.mark.parametrize("kind", ["missing", "text", "empty", "folder", "truncated"])
def test_a_file_that_is_no_library_says_why(build: Build, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "libacme.so"
    contents: dict[str, Any] = {"text": b"hello\n", "empty": b"", "truncated": build().read_bytes()[:1000]}
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(contents[kind])
    expected = "no such file" if kind in ("missing", "folder") else "cannot be loaded"
    with pytest.raises(BackendUnavailable, match=expected) as error:
        CffiBackend("acme", path)
    assert str(path) in str(error.value)
    with pytest.raises(BackendUnavailable, match=expected), use_backend(str(path)):
        raise AssertionError("a backend that cannot be loaded was selected")
