"""A server app that was killed goes on after its last checkpoint, in another run of Flower, with the same result."""

from functools import partial

import pytest


pytest.importorskip("flwr")

from flwr.app import ConfigRecord

from peft_ravan.trainers import CheckpointError

from ..helpers import assert_same, comparable, ravan
from .grid import InProcessGrid
from .helpers import Federation, small


PERSONAL = {"scaffold": True, "local_parameters": ["classifier"], "optim": "sgd"}
RUNS = {
    "fedadam": {"server_optimizer": "fedadam", "lr_scheduler_type": "linear", "clients_per_round": 2},
    "scaffold, personal": PERSONAL,
}


class Killed(InProcessGrid):
    """The server app is killed in round 3, after one client has trained."""

    trained = 0

    def handle(self, message, context):
        if message.metadata.group_id == "3":
            if self.trained:
                raise KeyboardInterrupt
            self.trained += 1
        return super().handle(message, context)


def run(folder, states=None, grid_class=InProcessGrid, **options) -> Federation:
    configs = states and {name: {"state-dir": str(states / name)} for name in ("client_0", "client_1", "client_2")}
    args = small(folder, **{"num_rounds": 3, "save_strategy": "epoch", **options})
    federation = Federation(args, ravan, configs, grid_class)
    federation.run()
    return federation


@pytest.fixture(scope="module")
def personal(tmp_path_factory) -> Federation:
    """The uninterrupted run with SCAFFOLD and personal parts."""
    folder = tmp_path_factory.mktemp("personal")
    return run(folder / "whole", folder / "states", **PERSONAL)


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_killed_server_goes_on_with_the_same_result(tmp_path, personal, options):
    whole = personal if options is PERSONAL else run(tmp_path / "whole", tmp_path / "states of whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", tmp_path / "states", Killed, **options)
    assert [path.name for path in sorted((tmp_path / "cut").glob("checkpoint-*"))] == [
        "checkpoint-0", "checkpoint-1", "checkpoint-2",
    ]  # fmt: skip
    # the nodes are new processes, and what Flower has kept for them is gone with the first run
    gone_on = run(tmp_path / "cut", tmp_path / "states", resume_from_checkpoint=True, **options)
    assert_same(gone_on.adapter(), whole.adapter())
    assert comparable(gone_on.records) == comparable(whole.records)


def test_the_state_of_clients_is_in_their_folder_and_nowhere_else(tmp_path):
    federation = run(tmp_path / "out", tmp_path / "states", num_rounds=1, **PERSONAL)
    assert not any(context.state for context in federation.grid.contexts.values())
    assert not (tmp_path / "out" / "client_states").exists()
    files = sorted(path.relative_to(tmp_path).parts for path in (tmp_path / "states").rglob("*.safetensors"))
    assert [parts[1] for parts in files] == ["client_0", "client_1", "client_2"]


def test_nodes_that_are_simulated_have_one_folder_for_all(tmp_path, personal):
    """They are all configured alike, so the configuration of the run names it."""
    folder = {"run_config": {"state-dir": str(tmp_path / "states")}}
    one_round = {**PERSONAL, "num_rounds": 1}
    run(tmp_path / "one", tmp_path / "of each", grid_class=partial(InProcessGrid, **folder), **one_round)
    assert not (tmp_path / "states").exists()  # what a node says of its own folder comes first
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", grid_class=partial(Killed, **folder), **PERSONAL)
    gone_on = run(
        tmp_path / "cut", grid_class=partial(InProcessGrid, **folder), resume_from_checkpoint=True, **PERSONAL
    )
    assert_same(gone_on.adapter(), personal.adapter())


def test_without_a_folder_flower_keeps_the_state_of_clients_as_bytes(tmp_path):
    federation = run(tmp_path / "out", num_rounds=1, **PERSONAL)
    states = [context.state for context in federation.grid.contexts.values()]
    assert all(list(state) == ["peft-ravan.kept"] and len(state["peft-ravan.kept"]) == 1 for state in states)
    assert not any(isinstance(record, ConfigRecord) for state in states for record in state.values())
    assert not (tmp_path / "out" / "client_states").exists()


def test_a_run_without_folders_cannot_go_on_with_what_clients_kept(tmp_path):
    """Their nodes have forgotten it, and say so, rather than going on with something else."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, grid_class=Killed, **PERSONAL)
    with pytest.raises(RuntimeError, match="What client 'client_0' keeps could not be read"):
        run(tmp_path, resume_from_checkpoint=True, **PERSONAL)


def test_another_federation_is_not_gone_on_with(tmp_path):
    run(tmp_path, num_rounds=1)
    with pytest.raises(CheckpointError, match="belongs to another federation: other clients"):
        run(tmp_path, num_rounds=2, num_clients=4, resume_from_checkpoint=True)
