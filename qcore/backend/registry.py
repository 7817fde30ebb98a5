"""Which backend serves which device.

``QCORE_BACKEND`` and :func:`use_backend` take the same text:

- a name: ``cpu``, ``cuda``, ``hip``, ``cpu_reference``, or any entry point of the group ``qcore.backends``;
- the path of a shared library with the C ABI: ``/path/to/libacme.so``;
- an importable class or factory: ``acme.backend:AcmeBackend``;
- any of these per torch device type: ``cuda=hip,cpu=cpu_reference``.

A bare name serves the device types that the backend declares (the reference: every one); the others keep the
default, which goes by the tensor's device: ``cuda`` tensors take ``hip`` on a ROCm build of torch and ``cuda``
elsewhere, ``cpu`` tensors take ``cpu``, or ``cpu_reference`` with a warning where no native CPU backend can be loaded.
The variable is read once, when the first backend is needed.
"""

from __future__ import annotations

import difflib
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from threading import RLock
from typing import Any

import torch

from qcore.backend.cffi_backend import CffiBackend
from qcore.backend.interface import Backend, Description
from qcore.errors import BackendError, BackendNotFound, BackendUnavailable, InvalidArgument

GROUP = "qcore.backends"
VARIABLE = "QCORE_BACKEND"
ANY_DEVICE = "*"

# Backends of this project and how to get them; everything else is found through its entry point alone.
_FIRST_PARTY: Mapping[str, str] = {
    "cpu": "pip install qcore-cpu",
    "cuda": "pip install ./backends/cuda in a checkout (needs nvcc; docs/new-gpu.md)",
    "hip": "pip install ./backends/hip in a checkout (needs ROCm, or clang 19; docs/new-gpu.md)",
    "cpu_reference": "pip install qcore-quant",
}

log = logging.getLogger("qcore")
if os.environ.get("QCORE_VERBOSE") == "1" or os.environ.get("BITSANDBYTES_VERBOSE") == "1":
    log.setLevel(logging.INFO)
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
        log.handlers[0].setFormatter(logging.Formatter("qcore: %(message)s"))


@dataclass(frozen=True)
class BackendStatus:
    """One line of ``qcore info``."""

    name: str
    available: bool
    reason: str = ""  # why it is not available
    fix: str = ""  # what to do about it
    origin: str = ""  # "entry point qcore_cpu:load", a path
    device_types: tuple[str, ...] = ()
    description: Description | None = None


_loaded: dict[str, Backend] = {}
_failed: dict[str, BackendUnavailable] = {}
_lock = RLock()  # a factory may ask for another backend


@cache
def _entry_points() -> dict[str, tuple[EntryPoint, ...]]:
    """Entry points by name; two under one name are two backends, the same one found twice is one."""
    found: dict[str, dict[str, EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, {})[point.value] = point
    return {name: tuple(points[value] for value in sorted(points)) for name, points in found.items()}


def known_backends() -> list[str]:
    """Names that may be asked for: this project's own, then those of installed third parties."""
    return [*_FIRST_PARTY, *sorted(set(_entry_points()) - set(_FIRST_PARTY))]


def _said_by(point: EntryPoint) -> str:
    return f"{point.value} of {point.dist.name}" if point.dist else point.value


def get_backend(name: str) -> Backend:
    """The backend called ``name`` (a name, a path or ``module:attribute``), loaded once.

    Raises
    ------
    BackendNotFound
        There is none of that name; the message lists those that were found, and why the rest was not.
    BackendUnavailable
        It exists but cannot run here.
    """
    backend = _loaded.get(name)
    if backend is not None:
        return backend
    with _lock:
        if name in _loaded:
            return _loaded[name]
        if name in _failed:
            raise _failed[name]
        try:
            backend = _load(name)
        except BackendUnavailable as error:
            _failed[name] = error
            raise
        _loaded[name] = backend
    log.info("loaded backend %s", name)
    return backend


def _load(name: str) -> Backend:
    if os.sep in name or name.endswith((".so", ".dll", ".dylib")):
        return CffiBackend(name, name)
    if ":" in name:
        return _made(name, _imported(name))
    points = _entry_points().get(name, ())
    if len(points) > 1:
        raise BackendUnavailable(
            f"backend {name!r}: {len(points)} installed packages go by that name, {_listed(map(_said_by, points))}; "
            f"uninstall all but one, or select one as {points[0].value!r}"
        )
    for point in points:
        try:
            factory = point.load()
        except Exception as error:  # a third party's import may raise anything
            raise BackendUnavailable(f"backend {name!r}: {point.value} cannot be imported: {error}") from error
        return _made(name, factory)
    if name in _FIRST_PARTY:
        raise BackendUnavailable(f"backend {name!r}: not installed; {_FIRST_PARTY[name]}")
    close = difflib.get_close_matches(name, known_backends(), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise BackendNotFound(f"no backend {name!r}.{hint} {_inventory()}")


def _listed(words: Iterable[str]) -> str:
    return " and ".join(words)


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: an empty module name
        raise BackendNotFound(f"no backend {name!r}: {error}. {_inventory()}") from error
    except Exception as error:  # a third party's import may raise anything
        raise BackendUnavailable(f"backend {name!r}: cannot be imported: {type(error).__name__}: {error}") from error


def _made(name: str, factory: Callable[[], Backend]) -> Backend:
    try:
        backend = factory()
    except BackendUnavailable:
        raise
    except Exception as error:  # a third party's code may raise anything
        raise BackendUnavailable(f"backend {name!r}: failed to start: {type(error).__name__}: {error}") from error
    if not isinstance(backend, Backend):
        raise BackendUnavailable(f"backend {name!r}: made a {type(backend).__name__}, not a qcore Backend")
    if not backend.device_types:
        raise BackendUnavailable(f"backend {name!r}: device_types is empty; it has to name what it serves, or '*'")
    return backend


def _status(name: str) -> BackendStatus:
    points = _entry_points().get(name, ())
    origin = f"entry point {_listed(point.value for point in points)}" if points else ""
    try:
        backend = _loaded.get(name) or _load(name)
        kinds = tuple(sorted(backend.device_types))
        device = torch.device("cpu" if ANY_DEVICE in kinds or "cpu" in kinds else kinds[0])
        description = backend.describe(device)
        if not isinstance(description, Description):
            raise BackendUnavailable(f"backend {name!r}: describe() gave a {type(description).__name__}")
    except BackendError as error:
        return BackendStatus(name, False, str(error), _FIRST_PARTY.get(name, ""), origin)
    except Exception as error:  # a third party's code may raise anything
        reason = f"backend {name!r}: cannot describe itself: {type(error).__name__}: {error}"
        return BackendStatus(name, False, reason, _FIRST_PARTY.get(name, ""), origin)
    return BackendStatus(name, True, "", "", origin, kinds, description)


def backend_report() -> dict[str, BackendStatus]:
    """Every known backend: available or not, why, where from, the fix. What ``qcore info`` prints."""
    return {name: _status(name) for name in known_backends()}


def _inventory() -> str:
    found, missing = [], []
    for name in known_backends():
        status = _status(name)
        if status.available:
            found.append(name)
        else:
            missing.append(status.reason)
    return f"Available: {', '.join(found) or 'none'}. Not available: {'; '.join(missing) or 'none'}."


@dataclass
class _Selection:
    """One reading of the selection text; ``resolved`` caches the backend of each device type."""

    text: str
    source: str  # for messages: the environment variable or use_backend
    default: str | None = None
    per_device: dict[str, str] = field(default_factory=dict)
    resolved: dict[str, Backend] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, source: str) -> _Selection:
        selection = cls(text, source)
        for part in filter(None, (part.strip() for part in text.split(","))):
            kind, separator, name = part.partition("=")
            # A path may hold "=": only a plain word before it is a device type.
            if separator and kind.isidentifier():
                _device_type(kind, f"{source}={text!r}")
                if not name or kind in selection.per_device:
                    raise InvalidArgument(f"{source}={text!r}: expected each device type once, as device=backend")
                selection.per_device[kind] = name
            elif selection.default is None:
                selection.default = part
            else:
                raise InvalidArgument(f"{source}={text!r}: two backends without a device type; write device=backend")
        return selection

    def resolve(self, kind: str) -> Backend:
        backend = self._find(kind)
        if not _serves(backend, kind):
            served = ", ".join(sorted(backend.device_types))
            raise BackendUnavailable(
                f"{self.source}={self.text!r}: backend {backend.name!r} serves {served} tensors, not {kind} tensors"
            )
        log.info("%s tensors use backend %s", kind, backend.name)
        self.resolved[kind] = backend
        return backend

    def _find(self, kind: str) -> Backend:
        if kind in self.per_device:
            return get_backend(self.per_device[kind])
        if self.default is not None:
            backend = get_backend(self.default)
            if _serves(backend, kind):
                return backend
        return _default_backend(kind)


def _device_type(kind: str, what: str) -> None:
    """A misspelt device type would never be asked for, and the default would compute in silence."""
    try:
        known = torch.device(kind).type == kind
    except RuntimeError:
        known = False
    if not known:
        raise InvalidArgument(f"{what}: {kind!r} is no device type of torch; write cpu=..., cuda=... or the like")


def _serves(backend: Backend, kind: str) -> bool:
    return kind in backend.device_types or ANY_DEVICE in backend.device_types


def _default_backend(kind: str) -> Backend:
    if kind == "cuda":
        return get_backend("hip" if torch.version.hip else "cuda")
    if kind == "cpu":
        try:
            return get_backend("cpu")
        except BackendUnavailable as error:
            warnings.warn(
                f"CPU tensors are served by the NumPy reference, which is correct but slow, because {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return get_backend("cpu_reference")
    for name in known_backends():
        if name not in _FIRST_PARTY:
            try:
                backend = get_backend(name)
            except BackendUnavailable:
                continue
            if kind in backend.device_types:
                return backend
    raise BackendUnavailable(f"no backend serves {kind} tensors. {_inventory()}")


_override: ContextVar[_Selection | None] = ContextVar("qcore_backend", default=None)
_process: _Selection | None = None


def _process_selection() -> _Selection:
    global _process
    if _process is None:
        _process = _Selection.parse(os.environ.get(VARIABLE, ""), VARIABLE)
    return _process


def selection() -> object:
    """What is selected now: the same object as before means that every device still has the same backend."""
    return _override.get() or _process or _process_selection()


def backend_for(device: torch.device | str) -> Backend:
    """The backend that serves tensors of ``device`` under the current selection.

    Raises
    ------
    BackendNotFound, BackendUnavailable
        As :func:`get_backend`; never a silent fallback.
    """
    selection = _override.get() or _process or _process_selection()
    kind = device.type if isinstance(device, torch.device) else torch.device(device).type
    return selection.resolved.get(kind) or selection.resolve(kind)


@contextmanager
def use_backend(backend: str | Backend) -> Iterator[None]:
    """Select a backend inside a ``with`` block, for the current thread or task.

    Parameters
    ----------
    backend : str or Backend
        What ``QCORE_BACKEND`` takes, or a backend itself.

    Raises
    ------
    BackendNotFound, BackendUnavailable
        On entry, so that a wrong name does not wait for the first op.
    InvalidArgument
        The text names no backend, or an unknown device type; or it is neither a text nor a backend.
    """
    if not isinstance(backend, (str, Backend)):
        raise InvalidArgument(f"use_backend: backend is {backend!r}, needs a name or an instance of a Backend")
    if isinstance(backend, Backend):
        selection = _Selection(backend.name, "use_backend")
        kinds = {"cpu", "cuda", "xpu", "mps"} if ANY_DEVICE in backend.device_types else backend.device_types
        selection.resolved = dict.fromkeys(kinds, backend)
    else:
        selection = _Selection.parse(backend, "use_backend")
        if selection.default is None and not selection.per_device:
            raise InvalidArgument(f"use_backend: {backend!r} names no backend; {_inventory()}")
        for name in filter(None, [selection.default, *selection.per_device.values()]):
            get_backend(name)
    token = _override.set(selection)
    try:
        yield
    finally:
        _override.reset(token)


def reset() -> None:
    """Forget what was loaded and chosen, and read ``QCORE_BACKEND`` and the entry points again at the next use."""
    global _process
    with _lock:
        _process = None
        _loaded.clear()
        _failed.clear()
        _entry_points.cache_clear()
