"""
A federation of real processes loses its server, goes on, loses a node, and gives the adapter of a FederatedTrainer.

It is one story, since each of its processes imports torch and transformers: what it needs is told once, and each test
looks at a part of it. That takes as long as a third of all other tests, so it is left to `make test-flower`, which CI runs.
In one process, `test_equal.py`, `test_resuming.py` and `test_faults.py` show the same.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest


pytest.importorskip("flwr")

from safetensors.torch import load_file

from peft_ravan.trainers import read_history

from ..helpers import assert_same
from .loopback import CONFIG, EXAMPLE, NEEDS_PROCESSES, Loopback, run_alone


pytestmark = [*NEEDS_PROCESSES, pytest.mark.deep]


@dataclass
class Story:
    """What is left of a federation over Flower, and of the same federation in one process."""

    over_flower: Path
    alone: Path
    logs: str


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Story:
    folder = tmp_path_factory.mktemp("story")
    over_flower, alone = folder / "over-flower", folder / "alone"
    with Loopback(folder / "flower", num_nodes=2) as loopback:
        run = loopback.start_run(EXAMPLE, **CONFIG, resume=False, output_dir=str(over_flower))
        loopback.wait_until((over_flower / "checkpoint-1").exists, run)
        loopback.kill_server_app()
        assert not (over_flower / "adapter_model.safetensors").exists()
        # Flower takes a minute to notice, which is no reason to wait
        run = loopback.start_run(EXAMPLE, **CONFIG, resume=True, output_dir=str(over_flower))
        loopback.wait_until(lambda: loopback.has_task(run, node=1, round_number=2), run)
        loopback.kill_node(1)
        run_alone(alone, fail_in_round_2)
        loopback.wait_for_the_end(run)
        return Story(over_flower, alone, loopback.logs())


def fail_in_round_2(client, round_number, update):
    if (client, round_number) == ("client_1", 2):
        raise RuntimeError("killed")


def assert_same_adapters(story: Story, name: str) -> None:
    assert (story.over_flower / name).exists(), story.logs
    assert_same(load_file(story.over_flower / name), load_file(story.alone / name))


def test_a_round_over_the_network_gives_the_same_adapter_bit_for_bit(story):
    assert_same_adapters(story, "checkpoint-1/adapter_model.safetensors")
    first, expected = (read_history(folder)[0] for folder in (story.over_flower, story.alone))
    assert first["clients"] == ["client_0", "client_1"] and not first["failed_clients"], story.logs
    assert first["train_loss"] == expected["train_loss"]


def test_a_server_that_is_killed_is_gone_on_with(story):
    assert [record["round"] for record in read_history(story.over_flower)] == [1, 2], story.logs
    assert_same_adapters(story, "adapter_model.safetensors")


def test_a_node_that_is_killed_costs_only_itself(story):
    last = read_history(story.over_flower)[-1]
    assert last["clients"] == ["client_0"], story.logs
    [failed] = last["failed_clients"]
    assert failed["client"] == "client_1" and failed["reason"].startswith("Its node reports an error: ")
