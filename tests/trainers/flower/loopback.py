"""A real SuperLink and real SuperNodes on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil


BIN = Path(sys.executable).parent


def is_installed() -> bool:
    return all((BIN / name).exists() for name in ("flwr", "flower-superlink", "flower-supernode"))


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Loopback:
    """
    Starts a SuperLink and SuperNodes, and stops them and all that they have started at the end.

    Args:
        folder (`Path`): Where Flower and the logs go.
        num_nodes (`int`): The number of nodes.
    """

    def __init__(self, folder: Path, num_nodes: int):
        self.folder, self.num_nodes, self.address = folder, num_nodes, f"127.0.0.1:{free_port()}"
        self.processes: list[subprocess.Popen] = []
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
        }

    def __enter__(self) -> Loopback:
        home = self.folder / "home"
        home.mkdir(parents=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "loop"\n\n[superlink.loop]\naddress = "{self.address}"\ninsecure = true\n'
        )
        host, port = self.address.split(":")
        self._start(
            "flower-superlink",
            "--insecure",
            "--disable-runtime-dependency-installation",
            "--host",
            host,
            "--port",
            port,
        )
        for index in range(self.num_nodes):
            self._start(
                "flower-supernode", "--insecure", "--superlink", self.address, "--port", str(free_port()),
                "--node-config", f"partition-id={index} num-partitions={self.num_nodes}",
            )  # fmt: skip
        self._wait_for_the_link()
        return self

    def __exit__(self, *error) -> None:
        for process in [process for process in reversed(self.processes) if process.poll() is None]:
            # each is the head of a group, which has the processes that it has started
            for sent in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, sent)
                    process.wait(timeout=10)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    pass

    def start_run(self, app: Path, **config) -> subprocess.Popen:
        given = " ".join(f"{name.replace('_', '-')}={json.dumps(value)}" for name, value in config.items())
        return self._start("flwr", "run", str(app), "loop", "--stream", "-c", given)

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

    def logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))

    def _start(self, *command: str) -> subprocess.Popen:
        with open(self.folder / f"{len(self.processes)}-{command[0]}.log", "w") as log:
            self.processes.append(
                subprocess.Popen(
                    [BIN / command[0], *command[1:]],
                    env=self.environment,
                    cwd=self.folder,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )  # fmt: skip
            )
        return self.processes[-1]

    def _wait_for_the_link(self) -> None:
        host, port = self.address.split(":")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex((host, int(port))) == 0:
                    return
            time.sleep(0.2)
        raise TimeoutError(self.logs())
