"""Every exception that qcore raises on purpose.

    QcoreError
    ├── InvalidArgument (ValueError)      an argument's value, shape, layout or length is not allowed
    │   └── InvalidDtype (TypeError)      an argument's dtype is not allowed
    ├── BackendError (RuntimeError)
    │   ├── BackendNotFound               no backend of that name; lists what was found, and why the rest was not
    │   ├── BackendUnavailable            it exists, but cannot run here: no device, no library, ABI too old
    │   ├── Unsupported (NotImplementedError)   a valid call that this backend does not serve
    │   ├── OutOfMemory (MemoryError)
    │   ├── DeviceError                   the device's runtime reported an error
    │   └── InternalError                 a defect of a backend
    ├── FormatError (ValueError)          a checkpoint or state dict is truncated, inconsistent or unknown
    ├── OutputError (OSError)             a result could not be written; what existed before still exists
    ├── NameTaken (ImportError)           another package holds the module name that qcore was asked to answer to
    └── IncompatibleVersion (ImportError)   another library is too old, too new or not installed

A message names the op, the argument, what was expected, what came and what to do.
"""

from __future__ import annotations


class QcoreError(Exception):
    """Base of every exception that qcore raises on purpose."""


class InvalidArgument(QcoreError, ValueError):
    """An argument's value, shape, layout or length is not allowed."""


class InvalidDtype(InvalidArgument, TypeError):
    """An argument's dtype is not allowed."""


class BackendError(QcoreError, RuntimeError):
    """A backend could not be found, loaded or used."""


class BackendNotFound(BackendError):
    """No backend of that name exists."""


class BackendUnavailable(BackendError):
    """A backend exists but cannot run here."""


class Unsupported(BackendError, NotImplementedError):
    """A valid call that this backend does not serve."""


class OutOfMemory(BackendError, MemoryError):
    """A backend or device ran out of memory."""


class DeviceError(BackendError):
    """The device's runtime reported an error."""


class InternalError(BackendError):
    """A defect of a backend."""


class FormatError(QcoreError, ValueError):
    """A checkpoint or state dict is truncated, inconsistent or of an unknown format."""


class OutputError(QcoreError, OSError):
    """A result could not be written; what existed before still exists."""


class NameTaken(QcoreError, ImportError):
    """Another package holds the module name that qcore was asked to answer to."""


class IncompatibleVersion(QcoreError, ImportError):
    """A library that a feature works with is too old, too new or not installed; names the one that is needed."""
