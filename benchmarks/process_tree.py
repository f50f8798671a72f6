"""What a process and all those that it has started use."""

from __future__ import annotations

import contextlib
import time

import psutil


SAMPLE_SECONDS = 1.0


class ProcessTree:
    """
    Peak memory and processor time of a process and its descendants, from samples.

    Memory is the sum of their proportional set sizes (`pss` of psutil, on Linux): pages that several processes share
    count once. Peaks between two samples, which are [`SAMPLE_SECONDS`] apart, are missed. Processor time is user and
    system time, which other work on the machine hardly changes.

    Attributes:
        peak_bytes (`int`): The largest sum of the memory so far.
        processor_ends (`list[float]`): The processor seconds so far at each round's end.
    """

    def __init__(self):
        self.peak_bytes, self.processor_ends = 0, []
        self._processes: dict[int, psutil.Process] = {}
        self._seconds: dict[int, float] = {}
        self._next_sample = 0.0

    def watch(self, pid: int, num_rounds: int) -> None:
        """Called again and again by `round_ends`."""
        is_due = time.monotonic() >= self._next_sample
        has_new_round = num_rounds > len(self.processor_ends)
        if is_due or has_new_round:
            self._find(pid)
            self._count_seconds()
        if has_new_round:
            self.processor_ends += [sum(self._seconds.values())] * (num_rounds - len(self.processor_ends))
        if is_due:
            self.peak_bytes = max(self.peak_bytes, sum(map(_proportional_bytes, self._processes.values())))
            self._next_sample = time.monotonic() + SAMPLE_SECONDS

    def stop(self) -> None:
        """End what is still running."""
        for process in self._processes.values():
            with contextlib.suppress(psutil.Error):  # `is_running` compares the time of creation
                if process.is_running():
                    process.terminate()
        _, left = psutil.wait_procs(list(self._processes.values()), timeout=5)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _find(self, pid: int) -> None:
        # a process that has lost its parent is still found through itself
        for known in [pid, *self._processes]:
            with contextlib.suppress(psutil.Error):
                process = self._processes.setdefault(known, psutil.Process(known))
                for child in process.children(recursive=True) if known == pid or process.ppid() == 1 else ():
                    self._processes.setdefault(child.pid, child)

    def _count_seconds(self) -> None:
        for pid, process in self._processes.items():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                self._seconds[pid] = times.user + times.system


def _proportional_bytes(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0
