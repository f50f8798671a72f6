"""Real processes of Flower on this machine, some of which are killed."""

import os
import runpy
import signal
from pathlib import Path
from types import SimpleNamespace

import psutil
from transformers import set_seed

from peft_ravan.examples.flower_digits import loopback
from peft_ravan.trainers import FederatedTrainer


EXAMPLE = Path(__file__).parents[3] / "examples" / "flower"
CONFIG = {"max_steps": 2, "merge_method": "ravan", "node_timeout": 240, "round_timeout": 240, "resume": False}
SECONDS = 500


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


def alone(folder: Path, num_rounds: int) -> Path:
    """The adapter of the same federation in a FederatedTrainer."""
    example = runpy.run_path(str(EXAMPLE / "federation.py"))
    config = {name.replace("_", "-"): value for name, value in CONFIG.items()}
    args = example["arguments"]({**config, "num-rounds": num_rounds, "output-dir": str(folder)})
    set_seed(args.seed)
    model = example["load_model"]()
    nodes = [SimpleNamespace(node_config={"partition-id": index, "num-partitions": 2}) for index in range(2)]
    parts = {f"client_{index}": example["load_data"](node) for index, node in enumerate(nodes)}
    trainer = FederatedTrainer(model, args, train_dataset=parts)
    trainer.train()
    trainer.save_model()
    return folder / "adapter_model.safetensors"
