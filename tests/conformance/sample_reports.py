"""Reports made by hand for the tests of the renderings, waivers and differences."""

from __future__ import annotations

from typing import Any

from qcore_conformance.model import SCHEMA, Outcome, Report, Result


def result(case_id: str, outcome: Outcome = Outcome.PASSED, **fields: Any) -> Result:
    op, level, _ = case_id.split("/")
    fields.setdefault("clauses", ["QC-GEMM4-004"])
    return Result(
        case_id=case_id,
        op=op,
        level=level,
        outcome=outcome,
        repro=f"qcore-conformance repro {case_id} --backend acme --seed 7",
        **fields,
    )


def report(results: list[Result], **fields: Any) -> Report:
    values: dict[str, Any] = {
        "schema": SCHEMA,
        "spec_version": "1.0",
        "started": "2026-11-22T16:00:00+00:00",
        "seconds": 12.5,
        "seed": 7,
        "complete": True,
        "selection": {"backend": "acme", "ops": [], "levels": ["L0", "L1", "L2", "L3"]},
        "backend": {
            "name": "acme",
            "device": "Acme A1",
            "arch": "acme-a1",
            "driver": "5.1",
            "runtime": "acmert 3",
            "library": "/opt/acme/libacme.so",
            "library_sha256": "ab" * 32,
            "abi": "1.0",
            "ops": {"gemm_4bit": 1, "quantize_4bit": 1},
            "declarations": {"gemm_4bit": {"depth": {"lanes": 8, "extra": 4}, "weight_rounding": "compute"}},
        },
        "environment": {"qcore": "0.1.0", "torch": "2.13.0", "python": "3.11.2", "platform": "Linux"},
        "results": results,
    }
    return Report(**{**values, **fields})


def mixed() -> Report:
    """A report with every outcome in it, and text that has to be escaped."""
    return report(
        [
            result("quantize_4bit/L0/blocksize-33", clauses=["QC-NUM-006"]),
            result("quantize_4bit/L1/nf4-f32-bs64-n65", clauses=["QC-NF4-002", "QC-4BIT-002"], seconds=0.4),
            result("quantize_4bit/L1/fp4-bf16-n65", Outcome.FAILED, message="byte 3 <is> 0x17, expected 0x71 & more"),
            result("gemm_4bit/L2/nf4-f32-m1", worst=0.31),
            result("gemm_4bit/L2/nf4-bf16-m1", worst=0.62),
            result("gemm_4bit/L2/nf4-f16-m1", Outcome.WAIVED, worst=1.8, message="failed: 1.8 over bound",
                   waiver={"reason": "v_dot2 | flushes", "link": "https://example.org/17", "expires": "2030-01-01"}),
            result("gemm_4bit/L3/nf4-f32-huge", Outcome.NOT_RUN, message="needs 9 GiB of free memory, 3 GiB are free"),
            result("gemm_4bit/L3/nf4-f32-threads", Outcome.CRASHED, message="worker died with SIGSEGV\x00"),
            result("gemm_4bit/L3/nf4-f32-repeat", Outcome.HUNG, message="no answer within 60 s"),
            result("int8_gemm/L1/n64", Outcome.UNSUPPORTED, message="int8_gemm: backend 'acme' does not serve this op"),
            result("dequantize_4bit/L1/nf4-f16-n65", Outcome.UNEXPECTED_PASS, message="passed, but waived",
                   waiver={"reason": "old driver", "link": "javascript:alert(1)", "expires": "2030-01-01"}),
            result("int8_dequantize_gemm/L2/f32", worst=0.0004, seconds=2.0),
        ]
    )  # fmt: skip
