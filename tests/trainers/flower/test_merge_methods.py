"""Every merge method and server optimizer gives over Flower what a FederatedTrainer gives, bit for bit."""

import pytest


pytest.importorskip("flwr")

from peft_ravan import RavanConfig
from peft_ravan.merging import MERGE_METHODS, SERVER_OPTIMIZERS

from ..helpers import lora, of_each_kind
from .helpers import Federation, assert_same_as_trainer, small, trained


def heads() -> RavanConfig:
    return RavanConfig(r=3, num_heads=2, task_type="SEQ_CLS")


def one_head() -> RavanConfig:
    return RavanConfig(r=4, num_heads=1, task_type="SEQ_CLS")


# a method is run with all of these that it takes, and with one head only if it takes nothing else
ADAPTERS = (lora, heads)


def options_for(merge_method) -> dict:
    """One round, and two for a method that remembers something or lets clients train A and B in turns."""
    method = MERGE_METHODS[merge_method]
    has_history = (
        method.frozen_cycle or method.changes_model or method.takes("server_state") or method.takes("round_number")
    )
    every = {"merge_options": {"every": 1}} if "every" in method.options else {}
    return {"merge_method": merge_method, "num_rounds": 2 if has_history else 1, "max_steps": 1, **every}


def taken(folder, merge_method, make_adapters) -> list:
    """The adapters of those given that a method takes, each trained by a FederatedTrainer in a folder of its name."""
    adapters = []
    for make_adapter in make_adapters:
        try:
            trained(folder / make_adapter.__name__, make_adapter, **options_for(merge_method))
        except ValueError as error:
            assert "merges" in str(error) or "needs" in str(error), error
        else:
            adapters.append(make_adapter)
    return adapters


@pytest.mark.parametrize("merge_method", of_each_kind(MERGE_METHODS))
def test_every_merge_method(tmp_path, merge_method):
    adapters = taken(tmp_path, merge_method, ADAPTERS) or taken(tmp_path, merge_method, [one_head])
    assert adapters
    for make_adapter in adapters:
        folder = tmp_path / make_adapter.__name__ / "flower"
        assert_same_as_trainer(Federation(small(folder, **options_for(merge_method)), make_adapter))


@pytest.mark.parametrize("server_optimizer", SERVER_OPTIMIZERS)
def test_every_server_optimizer(tmp_path, server_optimizer):
    options = {"server_optimizer": server_optimizer, "num_rounds": 2, "max_steps": 1}
    trained(tmp_path, heads, **options)
    assert_same_as_trainer(Federation(small(tmp_path / "flower", **options), heads))
