"""``bitsandbytes.autograd``: a package there, whose ``_functions`` is ``qcore.autograd``."""

from qcore import autograd as _functions
from qcore.autograd import MatmulLtState, matmul_4bit
from qcore.kernel_choice import matmul

__all__ = ["MatmulLtState", "_functions", "matmul", "matmul_4bit"]

# The import system asks a package for its path; the finder of qcore.compat.alias serves what is below.
__path__: list[str] = []
