"""Every op on small inputs of every kind of tail, once: what compute-sanitizer watches.

compute-sanitizer --tool memcheck python tools/gpu_small_calls.py LIBRARY [DEVICE]
"""

from __future__ import annotations

import sys

from qcore.backend import get_backend
from qcore_conformance.generators import rng_for
from qcore_conformance.samples import OPS, TAILS, samples
from qcore_conformance.session import Session


def main() -> None:
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    session = Session(get_backend(sys.argv[1]), sys.argv[2] if len(sys.argv) == 3 else None, spec=sys.argv[1])
    calls = 0
    for op in OPS:
        for dtype in ("f32", "bf16"):
            for sample in samples(op, rng_for(op, 0), dtype, TAILS):
                sample(session)
                calls += 1
    print(f"{calls} calls of {len(OPS)} ops on {session.description.device}")


if __name__ == "__main__":
    main()
