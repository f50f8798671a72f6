"""Real processes of Flower on this machine, some of which are killed."""

import os
import signal
from pathlib import Path

import psutil

from peft_ravan.examples.flower_digits import loopback


class Loopback(loopback.Loopback):
    """A loopback with accidents."""

    def run(self, app: Path, timeout: float, **config) -> None:
        self.start_run(app, **config).wait(timeout)

    def kill_server_app(self) -> None:
        """As the kernel does when memory runs out."""
        [found] = [
            process
            for process in psutil.Process(self.processes[0].pid).children(recursive=True)
            if any("flwr-serverapp" in part for part in process.cmdline())
        ]
        found.kill()

    def kill_node(self, index: int) -> None:
        """A node and all that it has started, as when its machine is switched off."""
        os.killpg(self.processes[1 + index].pid, signal.SIGKILL)
