"""Threads: as many as torch says, the team that torch has, and none left over after a fork.

Each scenario is a program of its own, because what is looked at (threads, teams, forks) belongs to a process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

# What the scenarios share. Kernel threads of this process, and those that worked during a call.
PRELUDE = """
import functools, os, sys, threading, time
import torch
import qcore
from qcore import functional as F
from qcore.backend.registry import backend_for

def tasks():
    return set(os.listdir("/proc/self/task"))

def cpu_seconds():
    found = {}
    for task in tasks():
        with open(f"/proc/self/task/{task}/schedstat") as file:
            found[task] = int(file.read().split()[0]) / 1e9
    return found

def workers(call, seconds=0.3):
    \"\"\"The threads that had a real share of the work of `call`, done again and again.\"\"\"
    call()
    before, end = cpu_seconds(), time.monotonic() + seconds
    while time.monotonic() < end:
        call()
    spent = {task: now - before.get(task, 0.0) for task, now in cpu_seconds().items()}
    return {task for task, used in spent.items() if used > 0.05 * sum(spent.values())}

torch.manual_seed(0)
x = torch.randn(1 << 20)
rows = torch.randn(64, 512)

def quantize():
    packed, state = F.quantize_4bit(x, quant_type="nf4")
    return packed, state.absmax

def product():
    return qcore.matmul_4bit(rows, *weight())

@functools.cache
def weight():
    return F.quantize_4bit(torch.randn(512, 512, generator=torch.Generator().manual_seed(1)), quant_type="nf4")

def torch_work():
    return torch.nn.functional.gelu(x)

def same(a, b):
    # In NumPy: in a forked child torch's own parallel ops hang.
    return all((p.numpy() == q.numpy()).all() for p, q in zip(a, b))
"""


def run(body: str, *, seconds: float = 120, **environment: str) -> str:
    program = PRELUDE + textwrap.dedent(body)
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            # Threads that wait asleep: the machine may have other work.
            env={**os.environ, "QCORE_BACKEND": "cpu", "OMP_WAIT_POLICY": "passive", **environment},
        )
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"hung for {seconds:g} s: {(error.stdout or b'').decode()} {(error.stderr or b'').decode()}")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_it_takes_as_many_threads_as_torch_says_also_when_that_changes() -> None:
    run("""
    for count in (3, 1, 2, 1, 4):
        torch.set_num_threads(count)
        for call in (quantize, product):
            found = len(workers(call))
            # Cores may be fewer, and a thread may get little of a busy machine, but never are there more.
            assert 1 <= found <= count, (call.__name__, count, found)
            assert count == 1 or len(tasks()) >= count, (call.__name__, count, len(tasks()))
            if count == 1:
                assert found == 1
    """)


def test_two_threads_share_the_work() -> None:
    run("""
    torch.set_num_threads(2)
    assert any(len(workers(quantize, 0.5)) == 2 for _ in range(20))
    """)


def test_it_adds_no_thread_to_those_of_torch() -> None:
    run("""
    torch.set_num_threads(3)
    torch_work()
    before = tasks()
    for _ in range(20):
        quantize(), product(), torch_work()
    assert tasks() == before, (before, tasks())  # the very same threads: none ended, none started
    """)


def test_a_thread_of_python_gets_a_team_of_the_size_that_torch_says() -> None:
    """torch.get_num_threads() belongs to the calling thread."""
    run("""
    want = quantize()
    torch.set_num_threads(1)
    seen, wrong = [], []

    def call():
        torch.set_num_threads(1)
        for _ in range(20):
            if not same(quantize(), want):
                wrong.append(1)
        seen.append(torch.get_num_threads())

    threads = [threading.Thread(target=call) for _ in range(4)]
    before = len(tasks())
    for thread in threads: thread.start()
    most = 0
    while any(thread.is_alive() for thread in threads):
        most = max(most, len(tasks()))
        time.sleep(0.01)
    assert seen == [1] * 4 and not wrong
    assert most <= before + 4, (before, most)
    """)


def test_many_threads_of_python_with_teams_of_their_own() -> None:
    run("""
    torch.set_num_threads(2)
    want, y, wrong = quantize(), product(), []

    def call():
        for _ in range(10):
            if not (same(quantize(), want) and same([product()], [y])):
                wrong.append(1)
            torch_work()

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not wrong
    """)


# In a forked child GNU OpenMP waits for ever for a team that stayed with the parent.
FORK = """
def child(body, limit=60):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            body()
            code = 0
        finally:
            os._exit(code)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.02)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "hung"
"""


@pytest.mark.parametrize(
    "parent",
    [
        "want, y = quantize(), product()",
        # The library has not been asked for a team yet: that the parent has one is torch's doing.
        "torch.set_num_threads(1); want, y = quantize(), product(); torch.set_num_threads(3); torch_work()",
    ],
    ids=["after-qcore", "after-torch"],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_forked_child_computes(parent: str, threads: int) -> None:
    run(
        FORK
        + textwrap.dedent(f"""
    torch.set_num_threads(3)
    {parent}

    def body():
        torch.set_num_threads({threads})  # starts threads of torch's own
        before = tasks()
        for _ in range(3):
            assert same(quantize(), want)
            assert same([product()], [y])
        assert tasks() == before, (before, tasks())  # what a call started has ended with it

    def grandchild():
        body()
        assert child(body) == 0

    assert child(body) == 0
    assert child(grandchild) == 0
    assert same(quantize(), want)  # the parent goes on with its team
    """)
    )


def test_a_child_that_loads_the_library_after_the_fork_computes() -> None:
    """The parent's team is torch's alone; the library cannot have seen the fork."""
    run(
        FORK
        + textwrap.dedent("""
    assert "libqcore_cpu.so" not in open("/proc/self/maps").read()
    torch.set_num_threads(3)
    torch_work()

    def body():
        qcore.functional.quantize_4bit(x, quant_type="nf4")
        assert "libqcore_cpu.so" in open("/proc/self/maps").read()

    assert child(body) == 0
    """)
    )


def test_workers_of_a_data_loader_compute_on_one_thread() -> None:
    """Eight workers of two threads each would be sixteen on two cores; a worker's torch.get_num_threads() is 1."""
    run("""
    from torch.utils.data import DataLoader, Dataset

    torch.set_num_threads(4)
    want, y = quantize(), product()

    class Quantized(Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            busy = workers(quantize, 0.05)
            right = same(quantize(), want) and same([product()], [y])
            own = str(os.getpid()) in busy
            return {"right": right, "busy": len(busy), "own": own, "threads": torch.get_num_threads()}

    loader = DataLoader(Quantized(), num_workers=2, multiprocessing_context="fork", batch_size=None, timeout=60)
    items = list(loader)
    assert len(items) == 8
    for item in items:
        assert item["right"], item
        assert item["threads"] == 1, item
        assert item["busy"] == 1 and item["own"], item
    assert same(quantize(), want)
    """)
