"""A node that makes other bases from the same seed can be sent those of the server, with the result of one process."""

import pytest


pytest.importorskip("flwr")

from flwr.app import Message
from peft import LoraConfig

from peft_ravan import RavanConfig
from peft_ravan.trainers.exchange import ClientReply, ClientTask
from peft_ravan.trainers.flower import TooFewNodesError
from peft_ravan.trainers.flower.codec import from_record, to_record
from peft_ravan.trainers.flower.introduction import LOST_BASES, Introduction

from ..helpers import FOUR_TARGETS, logged, lora
from .grid import CountingGrid
from .helpers import Federation, assert_same_as_trainer, small, trained


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr("peft_ravan.trainers.flower.nodes.POLL_SECONDS", 0.0)


def ravan(**kwargs):
    return RavanConfig(**{"r": 2, "num_heads": 2, "task_type": "SEQ_CLS", **kwargs})


def other_ravan():
    return ravan(projection_seed=1)


def other_lora():
    return LoraConfig(r=2, task_type="SEQ_CLS", target_modules=FOUR_TARGETS, init_lora_weights="gaussian")


def federation_of(
    folder, make_adapter=ravan, make_other=other_ravan, grid_class=CountingGrid, options=(), **server_options
):
    """A federation with a node, 107, whose torch makes another adapter."""
    args = small(folder / "flower", **dict(options))
    federation = Federation(args, make_adapter, grid_class=grid_class, **{"send_bases": True, **server_options})
    federation.make_other_adapter_at(107, make_other)
    return federation


ADAPTERS = {
    "ravan": (ravan, other_ravan, {}),
    "ravan without saved bases": (lambda: ravan(save_projection=False), other_ravan, {}),
    "ffa_lora": (lora, other_lora, {"merge_method": "ffa_lora"}),
}


@pytest.mark.parametrize("make_adapter, make_other, options", ADAPTERS.values(), ids=ADAPTERS)
def test_a_node_is_sent_them_once_and_trains_as_all_others(tmp_path, make_adapter, make_other, options):
    trained(tmp_path, make_adapter, **options)
    federation = federation_of(tmp_path, make_adapter, make_other, options=options)
    assert_same_as_trainer(federation)
    assert federation.grid.kinds_at(107) == ["query", "train.bases", *2 * ["train.on_sent_bases"]]
    assert federation.grid.kinds_at(100) == ["query", "train", "train"]


def test_the_configuration_of_the_run_can_have_it(tmp_path):
    federation = federation_of(tmp_path, options={"num_rounds": 1}, send_bases=False)
    with pytest.raises(TooFewNodesError, match="`send_bases=True` \\(`send-bases=true` in the configuration"):
        federation.run()
    federation.grid.run_config = {"send-bases": True}
    federation.run()
    assert federation.records[0]["clients"] == ["client_0", "client_1", "client_2"]


OTHERS = {
    "another rank": (ravan, lambda: ravan(r=3), "has not taken the bases: .* are those of another adapter"),
    "another number of heads": (ravan, lambda: ravan(num_heads=3), "has another adapter"),
    "another method": (ravan, lora, "has another adapter"),
    # the sketches of its gradients would be other projections
    "bases from gradients": (
        lambda: ravan(init_bases="gradient_svd"),
        lambda: ravan(init_bases="gradient_svd", projection_seed=1),
        "has another adapter",
    ),
}


@pytest.mark.parametrize("make_adapter, make_other, reason", OTHERS.values(), ids=OTHERS)
def test_what_cannot_be_sent_is_left_out(tmp_path, make_adapter, make_other, reason):
    federation = federation_of(tmp_path, make_adapter, make_other)
    with pytest.raises(TooFewNodesError, match=f"Node 107 .*{reason}") as raised:
        federation.run()
    assert "send_bases" not in str(raised.value)


def test_a_node_that_does_not_have_them_afterwards_is_left_out(tmp_path, monkeypatch):
    class Lying(CountingGrid):
        """It says what it said before."""

        said = None

        def handle(self, message, context):
            reply = super().handle(message, context)
            if context.node_id != 107:
                return reply
            if self.said is None:
                self.said = from_record(reply.content, Introduction)
            return Message(to_record(self.said), reply_to=message)

    warnings = logged(monkeypatch, "flower.nodes")
    federation = federation_of(tmp_path, grid_class=Lying, options={"num_rounds": 1}, min_nodes=2)
    federation.run()
    assert federation.records[0]["clients"] == ["client_0", "client_2"]
    assert len(warnings) == 1 and "Node 107 is left out. The node of 'client_1'" in warnings[0]


@pytest.mark.parametrize("bases", ["seeded", "gradient_svd"])
def test_a_node_that_has_lost_them_under_the_same_id_is_sent_them_again(tmp_path, bases):
    """It is a new process with the same key. Its client fails in this round, and takes part in the next one."""

    class Restarted(CountingGrid):
        def handle(self, message, context):
            if context.node_id == 107 and message.metadata.group_id == "2":
                context.state.clear()
            return super().handle(message, context)

    make_adapter = ravan if bases == "seeded" else lambda: ravan(init_bases="gradient_svd")
    federation = federation_of(tmp_path, make_adapter, grid_class=Restarted, options={"num_rounds": 4})
    if bases == "gradient_svd":
        federation.grid.other_apps.clear()
    federation.run()
    rounds = federation.records[-4:]
    assert [len(record["clients"]) for record in rounds] == [3, 2, 3, 3]
    [failed] = rounds[1]["failed_clients"]
    assert failed["client"] == "client_1" and "has lost the bases that it was sent" in failed["reason"]
    assert federation.grid.kinds_at(107).count("train.bases") == 2


def test_a_node_that_says_so_without_having_been_sent_any_is_sent_none(tmp_path):
    class Greedy(CountingGrid):
        def handle(self, message, context):
            reply = super().handle(message, context)
            if context.node_id != 107 or message.metadata.message_type != "train":
                return reply
            task = from_record(message.content, ClientTask)
            return Message(to_record(ClientReply.to(task, failure=LOST_BASES)), reply_to=message)

    federation = Federation(small(tmp_path), ravan, grid_class=Greedy)
    federation.run()
    assert [len(record["clients"]) for record in federation.records] == [2, 2]
    assert "train.bases" not in federation.grid.kinds_at(107)
