"""The example runs between real processes, and gives the adapter that a FederatedTrainer gives, bit for bit."""

import os
import time
from pathlib import Path

import pytest


pytest.importorskip("flwr")

from safetensors.torch import load_file

from peft_ravan.examples.flower_digits.loopback import is_installed
from peft_ravan.trainers import read_history

from ..helpers import assert_same
from .loopback import CONFIG, EXAMPLE, SECONDS, Loopback, alone


pytestmark = [
    pytest.mark.skipif(not is_installed(), reason="the commands of Flower are not next to this Python"),
    # each of its processes imports torch and transformers, so a run takes about a minute on two cores
    pytest.mark.skipif("PEFT_RAVAN_LOOPBACK" not in os.environ, reason="set PEFT_RAVAN_LOOPBACK=1 to run it"),
]


def wait_for_rounds(folder: Path, number: int, loopback: Loopback) -> None:
    deadline = time.monotonic() + SECONDS
    while not (folder / "rounds.jsonl").exists() or len(read_history(folder)) < number:
        assert time.monotonic() < deadline, loopback.logs()
        time.sleep(0.5)


def test_the_example_gives_the_same_adapter_over_the_network(tmp_path):
    with Loopback(tmp_path / "flower", num_nodes=2) as loopback:
        loopback.run(EXAMPLE, SECONDS, **CONFIG, num_rounds=1, output_dir=str(tmp_path / "out"))
        logs = loopback.logs()
    saved = tmp_path / "out" / "adapter_model.safetensors"
    assert saved.exists(), logs
    assert_same(load_file(saved), load_file(alone(tmp_path / "alone", 1)))


def test_a_node_that_is_killed_costs_only_itself(tmp_path):
    out = tmp_path / "out"
    with Loopback(tmp_path / "flower", num_nodes=2) as loopback:
        run = loopback.start_run(EXAMPLE, **CONFIG, num_rounds=2, output_dir=str(out))
        wait_for_rounds(out, 1, loopback)
        loopback.kill_node(1)
        run.wait(SECONDS)
        logs = loopback.logs()
    first, second = read_history(out)
    assert first["clients"] == ["client_0", "client_1"], logs
    assert second["clients"] == ["client_0"] and second["failed_clients"][0]["client"] == "client_1"
    assert "Its node" in second["failed_clients"][0]["reason"]
    assert (out / "adapter_model.safetensors").exists()


def test_a_server_that_is_killed_is_gone_on_with(tmp_path):
    out = tmp_path / "out"
    with Loopback(tmp_path / "flower", num_nodes=2) as loopback:
        run = loopback.start_run(EXAMPLE, **CONFIG, num_rounds=2, output_dir=str(out))
        wait_for_rounds(out, 1, loopback)
        while not (out / "checkpoint-1").exists():
            time.sleep(0.2)
        loopback.kill_server_app()
        run.wait(SECONDS)
        assert not (out / "adapter_model.safetensors").exists()
        loopback.run(EXAMPLE, SECONDS, **{**CONFIG, "resume": True}, num_rounds=2, output_dir=str(out))
        logs = loopback.logs()
    assert (out / "adapter_model.safetensors").exists(), logs
    assert [record["round"] for record in read_history(out)] == [1, 2]
    assert_same(load_file(out / "adapter_model.safetensors"), load_file(alone(tmp_path / "alone", 2)))
