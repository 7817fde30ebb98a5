"""Worker processes at the cost of a fork: one process imports torch and the cases once, and every worker is its child.

Importing torch takes seconds, and a run that meets crashes, or looks for them, starts a worker for each. The server
imports and waits: it opens no backend and computes nothing, so that a child inherits no thread pool and no context of
a device. It reads requests from a socket, 8 bytes each: 0 together with three file descriptors asks for a child with
these as its standard streams and is answered with its process id; a process id asks for the exit code of that child.

multiprocessing has such a server, whose children import the main module of the caller again: a program that runs the
suite without a guard around its first call would start itself anew. Its children also keep the caller's streams, where
a worker's have to be its own.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from qcore.errors import BackendUnavailable

_MESSAGE = struct.Struct("<q")
_FORK = 0
_RUNNING = 1 << 32  # no exit code
_LINGER_SECONDS = 10.0


class ForkServer:
    """The server of this process, started with the first worker; it ends with this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # a fork of this process has no part in its server

    def start(self) -> None:
        """Start the server, unless it runs already; it imports while the caller goes on."""
        with self._lock:
            self._start()

    def fork(self, stdin: int, stdout: int, stderr: int) -> int:
        """Process id of a new worker with these file descriptors as its standard streams."""
        with self._lock:
            return self._ask(_FORK, (stdin, stdout, stderr))

    def wait(self, pid: int) -> int:
        """Exit code of a worker that is ending, or the negative number of a signal; one that does not end is killed."""
        killing = time.monotonic() + _LINGER_SECONDS
        while True:
            with self._lock:
                code = self._ask(pid)
            if code != _RUNNING:
                return code
            if time.monotonic() > killing:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)

    def stop(self) -> None:
        """End the server; its workers see the end of their standard input, as they do when this process ends."""
        if self._socket is not None and self._process is not None and self._owner == os.getpid():
            self._socket.close()
            self._process.kill()
            self._process.wait()
        self._socket = self._process = None

    def _start(self) -> None:
        if self._socket is not None and self._owner == os.getpid():
            return
        self._socket, theirs = socket.socketpair()
        # The oracle's products are small: more BLAS threads would only contend with the backend's own.
        environment = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | os.environ
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "qcore_conformance.forkserver", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._owner = os.getpid()
        atexit.register(self.stop)

    def _ask(self, number: int, descriptors: tuple[int, ...] = ()) -> int:
        self._start()
        assert self._socket is not None
        try:
            socket.send_fds(self._socket, [_MESSAGE.pack(number)], descriptors)
            answer = self._socket.recv(_MESSAGE.size, socket.MSG_WAITALL)
        except OSError:
            answer = b""
        if len(answer) != _MESSAGE.size:
            self.stop()
            raise BackendUnavailable("the process that workers are forked from has ended; see its standard error")
        value: int = _MESSAGE.unpack(answer)[0]
        return value


def serve(control: socket.socket, work: Callable[[], int]) -> None:
    """Answer requests up to the end of the socket; ``work`` is a worker's whole life and gives its exit code."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, _MESSAGE.size, 3)
        if not message:
            return
        number = _MESSAGE.unpack(message)[0]
        if number == _FORK:
            number = os.fork()
            if number == 0:
                control.close()
                _live(descriptors, work)
            for descriptor in descriptors:
                os.close(descriptor)
        else:
            ended, status = os.waitpid(number, os.WNOHANG)
            number = os.waitstatus_to_exitcode(status) if ended else _RUNNING
        control.sendall(_MESSAGE.pack(number))


def _live(descriptors: list[int], work: Callable[[], int]) -> NoReturn:
    code = 1
    try:
        os.setsid()
        for stream, descriptor in enumerate(descriptors):
            os.dup2(descriptor, stream)
            os.close(descriptor)
        code = work()
    except SystemExit as error:  # a backend that exits
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


SERVER = ForkServer()

if __name__ == "__main__":
    from qcore_conformance import cases, session  # noqa: F401 (what every worker needs, torch before all)
    from qcore_conformance.worker import main

    cases.all_cases()
    serve(socket.socket(fileno=int(sys.argv[1])), main)
