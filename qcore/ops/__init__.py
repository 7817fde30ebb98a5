"""The ops: validate, allocate, dispatch to a backend; one file a family.

Each op is a Python function that returns new tensors, and ``torch.ops.qcore.<op>`` for tracers: importing this package
registers them all. What an op computes is in ``docs/spec/``; who computes it is chosen by ``qcore.backend.registry``.
"""

from qcore.ops import blockwise, fourbit, gemm_4bit, int4, int8, int8_linear, optimizer

__all__ = ["blockwise", "fourbit", "gemm_4bit", "int4", "int8", "int8_linear", "optimizer"]
