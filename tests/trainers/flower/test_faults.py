"""Nodes that are lost, late, broken or hostile cost only themselves, and the record says why."""

import re
from dataclasses import replace

import pytest
import torch


pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from peft_ravan.trainers import RoundFailedError, make_clients
from peft_ravan.trainers.exchange import ClientReply, ClientTask
from peft_ravan.trainers.flower import make_client_app
from peft_ravan.trainers.flower.codec import RECORD, from_record, to_record

from ...conftest import classification_dataset
from ..helpers import assert_same, logged, make_trainer
from .bad_clients import BAD_CLIENT, BAD_NODE, changed, faulty, raising
from .grid import InProcessGrid
from .helpers import NUM_CLIENTS, Federation, load_model, small


def with_update(make):
    return lambda reply: to_record(replace(reply, update={name: make(t) for name, t in reply.update.items()}))


def damaged(reply):
    content = to_record(reply)
    data = content[RECORD]["tensors"].data[:-8]
    content[RECORD]["tensors"] = Array("bytes", (len(data),), "peft-ravan.message", data)
    return content


FAULTS = {
    "lost": (lambda reply: None, "Its node has not replied within 3600 seconds."),
    "raising": (raising, "Its node reports an error: <class 'RuntimeError'>:<'out of paper'>"),
    "failed": (changed(update=None, failure="OutOfMemoryError: no room"), "OutOfMemoryError: no room"),
    "NaN": (with_update(lambda tensor: tensor * torch.nan), "NaN"),
    "shape": (with_update(lambda tensor: tensor[..., :1].clone()), "shape"),
    "scalar": (with_update(lambda tensor: tensor.sum()), "shape"),
    "no examples": (changed(num_examples=0), "num_examples"),
    "other names": (
        lambda reply: to_record(replace(reply, update={"../../x": torch.zeros(3)})),
        "missing from the update",
    ),
    "nothing": (lambda reply: RecordDict(), "Its reply cannot be read. A message of Flower must have the record"),
    "metrics": (lambda reply: RecordDict({"m": MetricRecord({"loss": 0.1})}), "Its reply cannot be read."),
    "10,000 arrays": (
        lambda reply: RecordDict(
            {RECORD: ArrayRecord({str(i): Array("bytes", (0,), "x", b"") for i in range(10_000)})}
        ),
        "and 9,997 more",
    ),
    "a task": (lambda reply: to_record(ClientTask(1, BAD_CLIENT, {}, 0)), "The message is not a ClientReply"),
    "cut off": (damaged, "Its reply cannot be read."),
    "another run": (changed(run="another"), "It has replied to another task: .* and run 'another'"),
    "an old round": (changed(round_number=0), "It has replied to another task: .* round 0"),
    "another attempt": (changed(attempt=2), "It has replied to another task: .* attempt 2"),
    "another client": (changed(client="client_0"), "It has replied to another task: of client 'client_0'"),
    "another purpose": (changed(purpose="sketch"), "It has replied to another task"),
    "unasked bits": (changed(upload_dtype="int4"), "was asked for whole tensors"),
}


@pytest.fixture(scope="module")
def without_the_client(tmp_path_factory):
    """The state after a round in which the bad client has raised an error."""

    def fault(client, round_number, update):
        if client == BAD_CLIENT:
            raise RuntimeError("out of paper")

    trainer = make_trainer(
        tmp_path_factory.mktemp("one"), num_clients=NUM_CLIENTS, max_steps=1, num_rounds=1, client_fault=fault
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("change, reason", FAULTS.values(), ids=FAULTS)
def test_a_bad_client_costs_only_itself(tmp_path, without_the_client, change, reason):
    federation = Federation(small(tmp_path, num_rounds=1), grid_class=faulty(change))
    federation.run()
    [record] = federation.records
    assert record["clients"] == ["client_0", "client_2"]
    [failed] = record["failed_clients"]
    assert failed["client"] == BAD_CLIENT
    assert re.search(reason, failed["reason"]), failed["reason"]
    merged = {name: tensor for name, tensor in without_the_client.last_global_state.items() if "ravan_H" in name}
    saved = federation.adapter()
    assert_same({name: saved[name] for name in merged}, merged)


def test_a_round_is_repeated_within_the_round_of_flower(tmp_path):
    options = {"num_rounds": 2, "clients_per_round": 1, "min_successful_clients": 1}
    attempts = []

    class FailsOnce(InProcessGrid):
        def handle(self, message, context):
            if message.metadata.message_type == "train":
                attempts.append(context.node_id)
                if len(attempts) == 1:
                    raise RuntimeError("out of paper")
            return super().handle(message, context)

    federation = Federation(small(tmp_path / "flower", **options), grid_class=FailsOnce)
    federation.run()

    failed = []

    def fault(client, round_number, update):
        if not failed:
            failed.append(client)
            raise RuntimeError("out of paper")

    trainer = make_trainer(tmp_path / "trainer", num_clients=NUM_CLIENTS, max_steps=1, **options, client_fault=fault)
    trainer.train()
    assert [record["attempts"] for record in federation.records] == [2, 1]
    assert [failure["client"] for failure in federation.records[0]["failed_clients"]] == failed
    names = [name for name in trainer.last_global_state if "ravan_H" in name]
    saved = federation.adapter()
    assert_same({name: saved[name] for name in names}, {name: trainer.last_global_state[name] for name in names})


def test_a_run_ends_if_no_attempt_succeeds(tmp_path):
    class Broken(InProcessGrid):
        def handle(self, message, context):
            if message.metadata.message_type == "train":
                raise RuntimeError("out of paper")
            return super().handle(message, context)

    federation = Federation(small(tmp_path, max_round_attempts=2), grid_class=Broken)
    with pytest.raises(RoundFailedError, match="in each of 2 attempts. Failed: 'client_0' .*out of paper"):
        federation.run()


def test_a_node_that_is_gone_is_not_waited_for(tmp_path):
    class Shrinking(InProcessGrid):
        def send_and_receive(self, messages, *, timeout=None):
            messages = list(messages)
            assert all(message.metadata.dst_node_id in self.contexts for message in messages)
            replies = super().send_and_receive(messages, timeout=timeout)
            if any(message.metadata.message_type == "train" for message in messages):
                self.contexts.pop(BAD_NODE, None)  # after the first round
            return replies

    federation = Federation(small(tmp_path), grid_class=Shrinking)
    federation.run()
    first, second = federation.records
    assert len(first["clients"]) == 3 and second["clients"] == ["client_0", "client_2"]
    assert second["failed_clients"] == [{"client": BAD_CLIENT, "reason": "Its node is not connected."}]


def test_answers_to_other_messages_are_left_out(tmp_path, monkeypatch):
    class Echo(InProcessGrid):
        """The answers of the first round come again in the second."""

        earlier = ()

        def send_and_receive(self, messages, *, timeout=None):
            replies = super().send_and_receive(messages, timeout=timeout)
            if not replies or replies[0].metadata.message_type != "train":
                return replies
            again, self.earlier = [*self.earlier, *replies], replies
            return again

    warnings = logged(monkeypatch, "flower.courier")
    federation = Federation(small(tmp_path), grid_class=Echo)
    federation.run()
    assert [record["clients"] for record in federation.records] == 2 * [["client_0", "client_1", "client_2"]]
    assert warnings == ["3 answers to other messages than those of the round are left out."]


def test_a_node_that_has_lost_what_it_kept_says_so(tmp_path):
    class Forgetful(InProcessGrid):
        def handle(self, message, context):
            if context.node_id == BAD_NODE:
                context.state.clear()
            return super().handle(message, context)

    options = {"local_parameters": ["classifier"]}
    federation = Federation(small(tmp_path, **options), grid_class=Forgetful)
    federation.run()
    first, second = federation.records
    assert len(first["clients"]) == 3 and second["clients"] == ["client_0", "client_2"]
    assert "What client 'client_1' keeps could not be read" in second["failed_clients"][0]["reason"]


def test_what_a_client_keeps_is_as_before_when_its_app_fails(tmp_path):
    """Only a merged update counts: the node has both states, and the server names the one to go on from."""
    options = {"local_parameters": ["classifier"], "num_rounds": 3}
    federation = Federation(small(tmp_path / "flower", **options), grid_class=faulty(changed(num_examples=0), (2,)))
    federation.run()

    def fault(client, round_number, update):
        return replace(update, num_examples=0) if (client, round_number) == (BAD_CLIENT, 2) else None

    trainer = make_trainer(tmp_path / "trainer", num_clients=NUM_CLIENTS, max_steps=1, **options, client_fault=fault)
    trainer.train()
    assert [len(record["clients"]) for record in federation.records] == [3, 2, 3]
    names = [name for name in trainer.last_global_state if "ravan_H" in name]
    saved = federation.adapter()
    assert_same({name: saved[name] for name in names}, {name: trainer.last_global_state[name] for name in names})


@pytest.fixture
def node(tmp_path):
    data = make_clients(classification_dataset(), small(tmp_path))["client_0"]
    grid = InProcessGrid(
        make_client_app(load_model, lambda context: data, small(tmp_path)), {7: {"client-name": "north"}}
    )
    return lambda content: grid.send_and_receive([Message(content, 7, "train")])[0]


HOSTILE_TASKS = {
    "nothing": (RecordDict(), "must have the record 'peft-ravan'"),
    "a reply": (to_record(ClientReply(1, "north", update={})), "is not a ClientTask"),
    "for another client": (to_record(ClientTask(1, "south", {}, seed=1)), "is for the client 'south'"),
}


@pytest.mark.parametrize("content, reason", HOSTILE_TASKS.values(), ids=HOSTILE_TASKS)
def test_a_node_refuses_what_is_no_task_for_it(node, content, reason):
    answer = node(content)
    assert answer.has_error() and reason in answer.error.reason


def test_a_node_says_what_is_wrong_with_a_task(node):
    reply = from_record(node(to_record(ClientTask(1, "north", {"x": torch.zeros(3)}, seed=1))).content, ClientReply)
    assert reply.update is None and "lacks" in reply.failure


def test_arguments_that_do_not_fit_are_refused(tmp_path):
    federation = Federation(small(tmp_path, clients_per_round=3), min_nodes=2)
    federation.grid.contexts.pop(BAD_NODE)
    with pytest.raises(ValueError, match="only 2 clients"):
        federation.run()
