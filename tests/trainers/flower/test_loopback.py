"""The example runs between real processes, and gives the adapter that a FederatedTrainer gives, bit for bit."""

import os
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest


pytest.importorskip("flwr")

from safetensors.torch import load_file
from transformers import set_seed

from peft_ravan.trainers import FederatedTrainer

from ..helpers import assert_same
from .loopback import Loopback, is_installed


EXAMPLE = Path(__file__).parents[3] / "examples" / "flower"
CONFIG = {"num_rounds": 1, "max_steps": 2, "merge_method": "ravan", "node_timeout": 240, "round_timeout": 240}

pytestmark = [
    pytest.mark.skipif(not is_installed(), reason="the commands of Flower are not next to this Python"),
    # each of its processes imports torch and transformers, which takes about a minute on two cores
    pytest.mark.skipif("PEFT_RAVAN_LOOPBACK" not in os.environ, reason="set PEFT_RAVAN_LOOPBACK=1 to run it"),
]


def test_the_example_gives_the_same_adapter_over_the_network(tmp_path):
    with Loopback(tmp_path / "flower", num_nodes=2) as loopback:
        ended = loopback.run(EXAMPLE, 400, **CONFIG, output_dir=str(tmp_path / "out"))
        logs = loopback.logs()
    assert (tmp_path / "out" / "adapter_model.safetensors").exists(), ended.stdout[-3000:] + ended.stderr + logs

    example = runpy.run_path(str(EXAMPLE / "federation.py"))
    args = example["arguments"](
        {**{name.replace("_", "-"): value for name, value in CONFIG.items()}, "output-dir": str(tmp_path / "alone")}
    )
    set_seed(args.seed)
    model = example["load_model"]()
    parts = {
        f"client_{index}": example["load_data"](
            SimpleNamespace(node_config={"partition-id": index, "num-partitions": 2})
        )
        for index in range(2)
    }
    trainer = FederatedTrainer(model, args, train_dataset=parts)
    trainer.train()
    trainer.save_model()
    expected = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    assert_same(load_file(tmp_path / "out" / "adapter_model.safetensors"), expected)
