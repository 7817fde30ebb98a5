"""Workers are forked from one process: they start where their parent is now, and their end is known."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from qcore.errors import BackendUnavailable
from qcore_conformance import forkserver
from qcore_conformance.forkserver import SERVER, ForkServer
from qcore_conformance.runner import Target, Worker

BACKEND = """
import os
from qcore.errors import BackendUnavailable

class Tells:
    def __init__(self):
        raise BackendUnavailable(f"{os.environ['QCORE_SAYS']} in {os.getcwd()}")
"""


def test_a_worker_starts_in_the_folder_and_environment_of_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SERVER.start()
    (tmp_path / "late_backend.py").write_text(BACKEND)
    monkeypatch.chdir(tmp_path)
    for word in ("first", "second"):
        monkeypatch.setenv("QCORE_SAYS", word)
        with pytest.raises(BackendUnavailable, match=f"{word} in {tmp_path}"):
            Worker(Target("late_backend:Tells")).start()


def test_a_worker_is_a_process_group_and_a_child_of_the_server() -> None:
    worker = Worker(Target("cpu_reference"))
    worker.start()
    assert worker._pid is not None
    assert os.getsid(worker._pid) == os.getpgid(worker._pid) == worker._pid
    worker.stop()


def test_a_worker_that_closes_its_streams_and_stays_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forkserver, "_LINGER_SECONDS", 0.2)
    worker = Worker(Target("cpu_reference"))
    worker.start()
    assert worker._pid is not None
    assert SERVER.wait(worker._pid) == -signal.SIGKILL


def test_a_server_that_died_is_an_error_and_the_next_worker_starts_another() -> None:
    server = ForkServer()
    server.start()
    assert server._process is not None
    os.kill(server._process.pid, signal.SIGKILL)
    with pytest.raises(BackendUnavailable, match="the process that workers are forked from has ended"):
        server.fork(0, 1, 2)
    reader, writer = os.pipe()
    with open(os.devnull, "rb") as nothing:
        pid = server.fork(nothing.fileno(), writer, writer)  # it is told nothing, so it ends with a traceback
    os.close(writer)
    with open(reader, "rb") as said:
        assert b"JSONDecodeError" in said.read()
    assert server.wait(pid) == 1
    server.stop()
