"""The worker process: loads a backend, then runs the cases that are named on its standard input.

One JSON line each way. To the worker, first what to test and where: ``{"backend": ..., "device": ..., "seed": ...,
"folder": ..., "environment": {...}}``, then ``{"case": id}``. From it, first ``{"ready": {...}}`` or
``{"error": {...}}``, then ``{"result": {...}}`` for each case. Whatever a backend prints goes to standard error.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import IO, Any


def environment() -> dict[str, str]:
    """Versions of what the backend runs in."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    try:
        qcore = version("qcore-quant")
    except PackageNotFoundError:
        qcore = "not installed"
    return {
        "qcore": qcore,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
    }


def _open_session(backend: str, device: str | None, seed: int) -> tuple[Any, dict[str, Any]]:
    """The session and the first message; a backend that cannot be had is a message, not a traceback."""
    from qcore.backend import get_backend
    from qcore.errors import BackendError
    from qcore_conformance.session import Session

    try:
        session = Session(get_backend(backend), device, seed, spec=backend)
    except BackendError as error:
        return None, {"error": {"kind": type(error).__name__, "text": str(error)}}
    session.isolated = True
    said = session.description
    description = {part.name: getattr(said, part.name) for part in fields(said)}
    description |= {"spec": backend, "torch_device": str(session.device)}
    return session, {"ready": {"backend": description, "environment": environment()}}


def _serve(commands: IO[str], replies: IO[str]) -> int:
    def say(message: dict[str, Any]) -> None:
        # A third party's declarations may be any mapping; what JSON cannot hold at all is shown as text.
        replies.write(json.dumps(message, default=lambda x: dict(x) if isinstance(x, Mapping) else str(x)) + "\n")
        replies.flush()

    asked = json.loads(commands.readline())
    _settle(asked["folder"], asked["environment"])
    session, first = _open_session(asked["backend"], asked["device"], asked["seed"])
    say(first)
    if session is None:
        return 2
    from qcore_conformance.cases import case_by_id

    for line in commands:
        say({"result": asdict(session.run_case(case_by_id(json.loads(line)["case"])))})
    return 0


def _settle(folder: str, environment: dict[str, str]) -> None:
    """Be where ``python -m`` in this folder and environment would be: the fork server may have started elsewhere."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]


def main() -> int:
    """Serve until standard input ends; the exit code is 2 where the backend cannot be had."""
    faulthandler.enable()
    # Keep the real standard output for replies: a backend that prints must not break the protocol.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return _serve(os.fdopen(0, encoding="utf-8", closefd=False), replies)
