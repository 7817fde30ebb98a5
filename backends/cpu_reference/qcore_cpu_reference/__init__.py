"""The NumPy reference backend: the meaning of every op, slow and strict."""

from qcore_cpu_reference.backend import ReferenceBackend


def load() -> ReferenceBackend:
    """Entry point of the group ``qcore.backends``."""
    return ReferenceBackend()
