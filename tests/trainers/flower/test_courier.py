"""Whatever nodes answer, each task gets one reply, in the order of the tasks."""

import weakref

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given


pytest.importorskip("flwr")

from flwr.app import Error, Message
from flwr.supercore.task_identity import TaskIdentity

from peft_ravan.trainers.exchange import ClientReply, ClientTask
from peft_ravan.trainers.flower.codec import from_record, to_record
from peft_ravan.trainers.flower.courier import Courier

from ...properties import examples
from .grid import over_the_wire
from .records import any_content


CLIENTS = ("north", "east", "south", "west")


class AllButWest:
    """The nodes of all clients but one are connected."""

    def connected(self):
        return {client: 10 + index for index, client in enumerate(CLIENTS[:-1])}

    def message_type(self, client):
        return "train"


def tasks() -> list[ClientTask]:
    return [ClientTask(3, client, {"x": torch.ones(2)}, seed=1, run="run") for client in CLIENTS]


def good(message: Message) -> Message:
    return Message(to_record(ClientReply.to(from_record(message.content, ClientTask), update={})), reply_to=message)


@examples(100)
@given(st.lists(any_content | st.none(), min_size=2, max_size=2), st.randoms(use_true_random=False))
def test_each_task_gets_one_reply_whatever_comes_back(contents, random):
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 5, 1, 1
    courier = Courier(AllButWest(), timeout=9.0)
    sent = [over_the_wire(message) for message in courier.messages(tasks())]
    assert [message.metadata.dst_node_id for message in sent] == [10, 11, 12]
    answers = [good(sent[0])]
    answers += [Message(c, reply_to=m) for c, m in zip(contents, sent[1:], strict=True) if c is not None]
    random.shuffle(answers)
    replies = list(courier.replies(answers))
    assert [reply.client for reply in replies] == list(CLIENTS)
    assert [reply.failure is None for reply in replies] == [True, False, False, False]
    assert replies[-1].failure == "Its node is not connected."
    assert all(
        reply.answers(task) and len(reply.failure or "") < 1000 for reply, task in zip(replies, tasks(), strict=True)
    )


def test_an_error_is_known_by_what_it_answers_since_lost_nodes_have_the_id_of_the_link():
    courier = Courier(AllButWest(), timeout=9.0)
    sent = [over_the_wire(message) for message in courier.messages(tasks())]
    lost = Message(Error(3, "x" * 50_000), reply_to=sent[1])
    lost.metadata.__dict__["_src_node_id"] = 1
    replies = {reply.client: reply for reply in courier.replies([lost, good(sent[2]), good(sent[0])])}
    assert (
        replies["east"].failure.startswith("Its node reports an error: xxx") and len(replies["east"].failure) == 10_000
    )
    assert replies["north"].failure is None and replies["south"].failure is None


def test_the_messages_of_a_round_expire_with_it():
    [message, *_] = Courier(AllButWest(), timeout=9.0).messages(tasks())
    assert (message.metadata.ttl, message.metadata.group_id, message.metadata.message_type) == (9.0, "3", "train")


def test_a_round_without_clients_sends_nothing():
    courier = Courier(AllButWest(), timeout=9.0)
    assert courier.messages([]) == [] and list(courier.replies([])) == []


def test_an_answer_is_released_once_it_was_read():
    courier = Courier(AllButWest(), timeout=9.0)
    answers = [good(over_the_wire(message)) for message in courier.messages(tasks())]
    held = [weakref.ref(answer) for answer in answers]  # Flower holds the list as well
    left = [sum(answer() is not None for answer in held) for _ in courier.replies(answers)]
    assert left == [2, 1, 0, 0]
