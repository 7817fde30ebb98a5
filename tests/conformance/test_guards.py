"""Guards and protected pages notice what they are there for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import broken_backends
from qcore_conformance import calls, generators
from qcore_conformance.cases import case_by_id
from qcore_conformance.floats import f32, rounded
from qcore_conformance.guards import GUARDS, GuardedTensor, GuardError
from qcore_conformance.model import Outcome
from qcore_conformance.runner import Target, run_cases
from qcore_conformance.session import Session, empty

CODE = generators.CODEBOOKS["dynamic"]


def _dequantize(backend: type) -> None:
    session = Session(backend())
    calls.dequantize_absmax(session, np.arange(37, dtype=np.uint8), f32([1.0]), CODE, f32([0.5]), 256)


def test_a_right_backend_passes() -> None:
    _dequantize(broken_backends.Right)


@pytest.mark.parametrize(
    ("backend", "text"),
    [
        (broken_backends.WritesPastTheEnd, r"output 'out'.* 4 bytes past its end, the first at end \+ 0"),
        (broken_backends.WritesBeforeTheStart, r"output 'out'.* 4 bytes before its start, the last at offset -1"),
        (broken_backends.WritesIntoItsInput, r"input 'A'.* 37 bytes inside it"),
        (broken_backends.LeavesTheTail, r"output 'out': 1 of 37 elements, the first at 36"),
    ],
)
def test_a_wrong_access_is_named(backend: type, text: str) -> None:
    with pytest.raises(GuardError, match=text):
        _dequantize(backend)


def test_a_read_past_the_end_shows_in_the_result() -> None:
    session = Session(broken_backends.UsesWhatLiesBeyond())
    with pytest.raises(GuardError, match="'absmax': 1 of 2 elements, the first at 1"):
        calls.quantize_4bit(session, generators.values("normal", session.rng, 100, "f32"), "nf4", 64)


def test_poisons_and_alignments_differ() -> None:
    content = torch.arange(5, dtype=torch.float32)
    placed = [guard("x", content, torch.device("cpu"), is_input=True) for guard in GUARDS]
    assert all(torch.equal(one.tensor, content) for one in placed)
    assert [one.tensor.data_ptr() % 64 for one in placed] == [0, 4]
    beyond = [one.tensor.as_strided((1,), (1,), one.tensor.storage_offset() + 5) for one in placed]
    assert bool(beyond[0].isnan())
    assert bool(beyond[1].isfinite())


def test_a_refused_call_may_write_nothing_at_all() -> None:
    session = Session(broken_backends.Right())
    outputs = {"out": empty((3,), "f32")}
    session.call_refused({}, outputs, lambda tensors: None)
    with pytest.raises(GuardError, match="by a call that was refused"):
        session.call_refused({}, outputs, lambda tensors: tensors["out"].fill_(0))


def test_a_write_of_the_poison_itself_is_seen_by_the_other_poison() -> None:
    """An output that a backend leaves alone never looks written, whatever value was due."""
    guards = [guard("out", empty((2,), "u8"), torch.device("cpu"), is_input=False) for guard in GUARDS]
    assert guards[0].tensor.tolist() != guards[1].tensor.tolist()


def test_an_input_is_copied() -> None:
    content = torch.ones(4)
    guard = GuardedTensor("x", content, torch.device("cpu"), is_input=True)
    guard.tensor.zero_()
    assert content.sum() == 4
    with pytest.raises(GuardError, match="8 bytes inside it"):
        guard.check()


def test_a_dropped_read_past_the_end_is_a_crash_beside_a_protected_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(broken_backends.__file__).parent))
    cases = [case_by_id("dequantize_absmax/L1/f32-protected-pages"), case_by_id("dequantize_absmax/L1/two-roundings")]
    report = run_cases(Target("broken_backends:PeeksBeyond"), cases)
    assert [result.outcome for result in report.results] == [Outcome.CRASHED, Outcome.PASSED]
    assert "SIGSEGV" in report.results[0].message
    right = run_cases(Target("broken_backends:Right"), cases)
    assert [result.outcome for result in right.results] == [Outcome.PASSED, Outcome.PASSED]


def test_protected_pages_are_not_used_in_this_process() -> None:
    result = Session(broken_backends.PeeksBeyond()).run_case(case_by_id("dequantize_absmax/L1/f32-protected-pages"))
    assert result.outcome is Outcome.NOT_RUN


def test_bias_of_a_gemm_may_be_absent() -> None:
    session = Session(broken_backends.Right())
    from qcore_conformance.weights import random_weight

    weight = random_weight(session.rng, "nf4", 64, (3, 64))
    assert calls.gemm_4bit(session, rounded(np.zeros((2, 64)), "bf16"), weight).shape == (2, 3)
