"""A session: one backend under test on one device, and the guarded way to call it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qcore.backend import Backend, Description
from qcore.errors import BackendUnavailable, Unsupported
from qcore_conformance import generators
from qcore_conformance.bounds import GemmDeclaration
from qcore_conformance.floats import Floats, differs
from qcore_conformance.guards import GUARDS, GuardedTensor, GuardError, Placement
from qcore_conformance.model import Case, NotRun, Outcome, Result

Array = Floats | NDArray[Any]
Tensors = Mapping[str, torch.Tensor]

_TORCH_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_NUMPY_OF = {torch.int8: np.int8, torch.uint8: np.uint8, torch.int32: np.int32}
_FLOAT_OF = {dtype: name for name, dtype in _TORCH_FLOATS.items()}


def to_torch(value: Array) -> torch.Tensor:
    """A CPU tensor with the same bits. Shares memory with ``value``."""
    if isinstance(value, Floats):
        signed = np.int32 if value.dtype == "f32" else np.int16
        return torch.from_numpy(np.ascontiguousarray(value.bits).view(signed)).view(_TORCH_FLOATS[value.dtype])
    return torch.from_numpy(np.ascontiguousarray(value))


def from_torch(tensor: torch.Tensor) -> Array:
    """A copy of a tensor's bits: :class:`Floats` for floating-point dtypes, else an integer array."""
    tensor = tensor.detach().cpu().contiguous()
    name = _FLOAT_OF.get(tensor.dtype)
    if name is None:
        return tensor.numpy().astype(_NUMPY_OF[tensor.dtype], copy=True)
    signed, unsigned = (torch.int32, np.uint32) if name == "f32" else (torch.int16, np.uint16)
    return Floats(tensor.view(signed).numpy().view(unsigned).copy(), name)


def empty(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """The form of an output: ``dtype`` is "f32", "f16", "bf16", "u8", "i8" or "i32"."""
    integers = {"u8": torch.uint8, "i8": torch.int8, "i32": torch.int32}
    return torch.empty(shape, dtype=integers.get(dtype) or _TORCH_FLOATS[dtype])


class Session:
    """One backend on one device.

    Parameters
    ----------
    backend : Backend
    device : torch.device or str, optional
        By default the first device type that the backend names.
    seed : int
        The run's seed; a case's random numbers also depend on its id.
    spec : str, optional
        What the user wrote for the backend (name, path or ``module:Class``).

    Raises
    ------
    BackendUnavailable
        torch cannot use ``device`` here, or the backend cannot.
    """

    def __init__(
        self, backend: Backend, device: torch.device | str | None = None, seed: int = 0, spec: str | None = None
    ) -> None:
        self.backend = backend
        self.device = default_device(backend) if device is None else _usable_device(device)
        self.seed = seed
        self.spec = spec or getattr(backend, "name", type(backend).__name__)
        self.description: Description = backend.describe(self.device)
        self.rng = generators.rng_for("", seed)
        self.worst: float | None = None
        self.isolated = False  # whether a crash ends a process of its own; set by the worker and by ``repro``
        # How tensors are placed: a call runs once for each. How a call is made: as it is, or captured, or on a stream.
        self.placements: Sequence[Placement] = GUARDS
        self.around: Callable[[Callable[[], None]], None] = lambda call: call()

    def run_case(self, case: Case) -> Result:
        """Run one case in this process; every exception but ``KeyboardInterrupt`` is an outcome."""
        self.rng = generators.rng_for(case.id, self.seed)
        self.worst = None
        result = Result(case.id, case.op, case.level, list(case.clauses), Outcome.PASSED)
        start = time.perf_counter()
        if case.op != "contract" and not self.backend.supports(case.op):
            result.outcome = Outcome.UNSUPPORTED
            result.message = f"backend {self.backend.name!r} does not serve {case.op}"
            return result
        if case.params.get("isolated") and not self.isolated:
            result.outcome, result.message = Outcome.NOT_RUN, "needs a worker process: a failure ends the process"
            return result
        try:
            case.run(self)
        except NotRun as error:
            result.outcome, result.message = Outcome.NOT_RUN, str(error)
        except Unsupported as error:
            result.outcome, result.message = Outcome.UNSUPPORTED, str(error)
        except AssertionError as error:
            result.outcome, result.message = Outcome.FAILED, str(error) or "assertion without a message"
        except Exception as error:  # a backend under test may raise anything
            result.outcome, result.message = Outcome.FAILED, f"{type(error).__name__}: {error}"
        result.seconds = time.perf_counter() - start
        result.worst = self.worst
        return result

    @property
    def on_host(self) -> bool:
        return self.device.type == "cpu"

    @property
    def gemm(self) -> GemmDeclaration:
        """What the backend declares about ``gemm_4bit``."""
        return GemmDeclaration.parse(self.description.declarations)

    @property
    def gemm_int4(self) -> GemmDeclaration:
        """What the backend declares about ``gemm_int4``."""
        return GemmDeclaration.parse(self.description.declarations, "gemm_int4")

    @property
    def gemm_transposed(self) -> GemmDeclaration:
        """What the backend declares about ``gemm_4bit_transposed``."""
        return GemmDeclaration.parse(self.description.declarations, "gemm_4bit_transposed")

    @property
    def int8_transposed(self) -> GemmDeclaration:
        """What the backend declares about ``int8_linear_transposed``."""
        return GemmDeclaration.parse(self.description.declarations, "int8_linear_transposed")

    def record(self, ratio: float) -> None:
        """Note an error over its bound; the largest of a case goes into the report."""
        self.worst = ratio if self.worst is None else max(self.worst, ratio)

    def is_deterministic(self, op: str) -> bool:
        """False where the backend declares ``{op: {"deterministic": false}}`` (QC-NUM-007)."""
        said = self.description.declarations.get(op)
        return not (isinstance(said, Mapping) and said.get("deterministic") is False)

    def call(
        self,
        op: str,
        inputs: Mapping[str, Array | None],
        outputs: Mapping[str, torch.Tensor],
        invoke: Callable[[Backend, dict[str, Any]], None],
    ) -> dict[str, Any]:
        """Call the backend between guards, once for each placement; returns the outputs of the first call.

        Parameters
        ----------
        op : str
        inputs : mapping of argument name to array, or None for an absent optional argument
        outputs : mapping of argument name to the form of the output (:func:`empty`)
        invoke : callable
            Gets the backend and the guarded tensors by name, absent ones as None.

        Raises
        ------
        GuardError
            A canary changed, an input changed, or the two results differ.
        """
        contents = {name: to_torch(value) for name, value in inputs.items() if value is not None}
        absent = dict.fromkeys(name for name, value in inputs.items() if value is None)
        results: list[dict[str, Any]] = []
        for place in self.placements:
            tensors = {name: place(name, content, self.device, is_input=True) for name, content in contents.items()}
            tensors |= {name: place(name, form, self.device, is_input=False) for name, form in outputs.items()}
            arguments = {name: placed.tensor for name, placed in tensors.items()} | absent
            self.around(partial(invoke, self.backend, arguments))
            self.synchronize()
            for placed in tensors.values():
                placed.check()
            results.append({name: from_torch(tensors[name].tensor) for name in outputs})
        if self.is_deterministic(op):
            for other in results[1:]:
                _expect_independent(results[0], other)
        return results[0]

    @contextmanager
    def calling(
        self,
        placements: Sequence[Placement] | None = None,
        around: Callable[[Callable[[], None]], None] | None = None,
    ) -> Iterator[None]:
        """Place tensors, or make calls, in another way inside a ``with`` block."""
        before = self.placements, self.around
        self.placements, self.around = placements or self.placements, around or self.around
        try:
            yield
        finally:
            self.placements, self.around = before

    def call_refused(
        self,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, torch.Tensor],
        invoke: Callable[[dict[str, torch.Tensor]], None],
    ) -> None:
        """Make a call that has to be refused (``invoke`` checks how) and check that no byte was written."""
        tensors = {
            name: GuardedTensor(name, to_torch(value), self.device, is_input=True) for name, value in inputs.items()
        }
        tensors |= {name: GuardedTensor(name, form, self.device, is_input=False) for name, form in outputs.items()}
        invoke({name: guard.tensor for name, guard in tensors.items()})
        self.synchronize()
        for guard in tensors.values():
            guard.untouched()

    def synchronize(self) -> None:
        """Wait for the device, so that what it did is visible."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "xpu":
            torch.xpu.synchronize(self.device)


def _usable_device(device: torch.device | str) -> torch.device:
    try:
        usable = torch.device(device)
        torch.empty(1, device=usable)
    except Exception as error:  # torch raises AssertionError where it was built without the device
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BackendUnavailable(f"--device {device}: torch cannot use it here: {reason}") from error
    if usable.type == "meta":
        raise BackendUnavailable("--device meta: holds no values, so nothing could be checked")
    return usable


def default_device(backend: Backend) -> torch.device:
    """The device that a backend is tested on: a host unless it serves none."""
    kinds = backend.device_types
    return torch.device("cpu" if "cpu" in kinds or "*" in kinds else min(kinds))


def _expect_independent(first: Mapping[str, Array], second: Mapping[str, Array]) -> None:
    for name, one in first.items():
        other = second[name]
        if isinstance(one, Floats):
            assert isinstance(other, Floats)
            unequal = differs(one, other)
        else:
            unequal = np.asarray(one != other)
        if unequal.any():
            index = int(np.flatnonzero(unequal)[0])
            raise GuardError(
                f"output {name!r}: {int(unequal.sum())} of {unequal.size} elements, the first at {index}, depend on "
                f"what lies outside the inputs, on what the output held before, or on alignment: bytes left unwritten "
                f"or read out of bounds, or a nondeterministic op that is not declared so (QC-NUM-006, QC-NUM-007)"
            )
