"""Measurements of memory, each of which runs in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch


def memory_bytes(name: str) -> int:
    """
    Args:
        name (`str`): `"VmHWM"` for the peak of the resident memory, `"VmRSS"` for its current value.

    Returns:
        `int`: What /proc/self/status says of this process, on Linux.
    """
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(name + ":"))


def in_own_process(threads: int, function: Callable, *more) -> Any:
    """
    Args:
        threads (`int`): The number of threads that torch uses there.
        function (`Callable`): The measurement, which is called with the other arguments.

    Returns:
        What it returns.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        return pool.submit(function, *more).result()
