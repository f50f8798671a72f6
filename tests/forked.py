"""Child processes that begin with what their parent has imported, since importing torch and transformers takes seconds."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState


_FORK = multiprocessing.get_context("fork")
# Its processes come from one that has imported PEFT, and nothing of this package.
_CLEAN = multiprocessing.get_context("forkserver")
_CLEAN.set_forkserver_preload(["peft", "transformers", "transformers.models.auto.modeling_auto", __name__])


def run_forked(function: Callable, *args) -> int:
    """
    Run a function in a child process.

    Args:
        function (`Callable`): The function. What it writes to stderr is shown beside a failure of the test.
        args: Its arguments.

    Returns:
        `int`: The exit code, which is negative if the process was killed: minus the number of the signal.
    """
    process = _FORK.Process(target=_run, args=(function, *args), daemon=True)
    process.start()
    process.join(300)
    assert process.exitcode is not None, "The process has not ended after 5 minutes."
    return process.exitcode


def run_clean(code: str, folder: Path) -> tuple[int, str]:
    """
    Run code where PEFT and Transformers are imported, but not this package.

    Args:
        code (`str`): The code.
        folder (`Path`): The working folder.

    Returns:
        `tuple[int, str]`: The exit code, and what it has written to stderr.
    """
    process = _CLEAN.Process(target=_run_code, args=(code, folder), daemon=True)
    process.start()
    process.join(300)
    assert process.exitcode is not None, "The process has not ended after 5 minutes."
    return process.exitcode, (folder / "stderr.txt").read_text()


def start_together(function: Callable, *args, num_processes: int = 2) -> torch.multiprocessing.ProcessContext:
    """
    Start processes that find each other with `torch.distributed`, as a launcher does.

    Args:
        function (`Callable`): What each process runs.
        args: Its arguments.
        num_processes (`int`, *optional*, defaults to `2`): The number of processes.

    Returns:
        `ProcessContext`: The processes. `join` raises an error if one of them fails or is killed, and ends the others.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return torch.multiprocessing.start_processes(
        _run_with_others, (num_processes, port, function, *args), num_processes, join=False, start_method="fork"
    )


def join(processes: torch.multiprocessing.ProcessContext) -> None:
    """Wait until all processes have ended, at most 5 minutes."""
    end = time.monotonic() + 300
    while not processes.join(timeout=5):
        if time.monotonic() > end:
            for process in processes.processes:
                process.kill()
            pytest.fail("The processes have not ended after 5 minutes.")


def _run_code(code: str, folder: Path) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    # line by line, since the process does not end as others do
    sys.stderr = open(folder / "stderr.txt", "w", buffering=1)
    assert not any(name.startswith("peft_ravan") for name in sys.modules)
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})


def _run(function: Callable, *args) -> None:
    # what the parent has registered is its own, and multiprocessing would not run what the child registers
    atexit._clear()
    try:
        function(*args)
    finally:
        atexit._run_exitfuncs()


def _run_with_others(rank: int, num_processes: int, port: int, function: Callable, *args) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    # the parent is alone
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    _run(function, *args)
