"""The example runs in Flower's own simulation, and gives the adapter that a FederatedTrainer gives, bit for bit."""

from importlib.util import find_spec

import pytest


pytest.importorskip("flwr")

from safetensors.torch import load_file

from peft_ravan.examples.flower_digits.loopback import Simulation, is_installed
from peft_ravan.trainers import read_history

from ..helpers import assert_same
from .test_loopback import CONFIG, EXAMPLE, SECONDS, alone


pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install 'peft-ravan[flower-simulation]'"),
    pytest.mark.skipif(not is_installed(), reason="the commands of Flower are not next to this Python"),
]


def test_the_example_gives_the_same_adapter_in_simulation(tmp_path):
    out = tmp_path / "out"
    with Simulation(tmp_path / "flower", num_nodes=2) as simulation:
        run = simulation.start_run(EXAMPLE, **CONFIG, num_rounds=2, output_dir=str(out))
        run.wait(SECONDS)
        logs = simulation.logs()
    assert (out / "adapter_model.safetensors").exists(), logs
    assert [record["clients"] for record in read_history(out)] == [["client_0", "client_1"]] * 2
    assert_same(load_file(out / "adapter_model.safetensors"), load_file(alone(tmp_path / "alone", 2)))
