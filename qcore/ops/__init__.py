"""The ops: validate, allocate, dispatch to a backend; one file a family.

Each op is a Python function that returns new tensors, and ``torch.ops.qcore.<op>`` for tracers. What it computes is in
``docs/spec/``; who computes it is chosen by ``qcore.backend.registry``.
"""
