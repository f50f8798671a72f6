"""Tasks and replies as Flower's records: they survive the round trip, and anything else is refused."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given


pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from peft_ravan.trainers.exchange import ClientReply, ClientTask
from peft_ravan.trainers.flower.codec import HEADER, RECORD, TENSORS, from_record, to_record, to_records
from peft_ravan.trainers.messages import MessageError

from ...properties import examples
from ..messages import assert_equal, replies, tasks
from .grid import over_the_wire
from .records import any_content


def over_flower(content: RecordDict) -> RecordDict:
    return over_the_wire(Message(content, 7, "train")).content


def example(**fields) -> ClientReply:
    update = {"ravan_H": torch.randn(4, 16, 16), "classifier": torch.randn(3).to(torch.bfloat16)}
    return ClientReply(3, "north", update=update, num_examples=7, run="run", **fields)


def arrays(**changes: Array | None) -> RecordDict:
    """A record with other arrays than those of a reply."""
    record = {**to_record(example())[RECORD], **changes}
    return RecordDict({RECORD: ArrayRecord({name: array for name, array in record.items() if array is not None})})


@examples(50)
@given(tasks | replies)
def test_what_comes_out_is_what_went_in(message):
    assert_equal(from_record(over_flower(to_record(message)), type(message)), message)


def test_flower_carries_the_bytes_of_the_message_and_little_else():
    reply = example()
    parts = get_all_nested_objects(Message(to_record(reply), 7, "train"))
    assert reply.num_bytes < sum(len(part.deflate()) for part in parts.values()) < reply.num_bytes + 1500


def test_the_state_of_a_round_is_in_memory_and_stored_by_flower_once_for_all_clients():
    state = {"ravan_H": torch.randn(1000)}
    names = ("north", "a client with a longer name")
    contents = list(to_records(ClientTask(1, name, state, seed=len(name)) for name in names))
    assert contents[0][RECORD][TENSORS] is contents[1][RECORD][TENSORS]
    objects = {}
    for content in contents:
        objects.update(get_all_nested_objects(Message(content, 7, "train")))
    large = [part for part in objects.values() if len(part.deflate()) > 4000]
    assert len(large) == 1
    assert [from_record(content, ClientTask).client for content in contents] == list(names)


def test_other_tensors_are_not_shared():
    tasks_of_two = [
        ClientTask(1, name, {"ravan_H": torch.tensor([value])}, 1) for name, value in (("a", 1.0), ("b", 2.0))
    ]
    first, second = (from_record(content, ClientTask) for content in to_records(tasks_of_two))
    assert (first.state["ravan_H"].item(), second.state["ravan_H"].item()) == (1.0, 2.0)


def test_large_messages_arrive_in_chunks():
    reply = ClientReply(1, "north", update={"ravan_H": torch.randn(3_000_000)})  # 12 MB, and chunks have 5 MiB
    content = to_record(reply)
    assert len(content[RECORD][TENSORS].slice_array()) == 3
    assert_equal(from_record(over_flower(content), ClientReply), reply)


HOSTILE = {
    "nothing": (RecordDict(), "no other, got none"),
    "another record": (RecordDict({"arrays": ArrayRecord()}), "no other, got 'arrays'"),
    "a path": (RecordDict({"../../etc/passwd": to_record(example())[RECORD]}), "no other, got '../../etc/passwd'"),
    "a record too many": (
        RecordDict({**to_record(example()), "metrics": MetricRecord({"num-examples": 5})}),
        "no other, got 'peft-ravan', 'metrics'",
    ),
    "many records": (RecordDict({f"record {i}": MetricRecord() for i in range(20_000)}), "and 19,997 more"),
    "metrics": (RecordDict({RECORD: MetricRecord({HEADER: 1, TENSORS: 2})}), "must hold arrays, got a MetricRecord"),
    "a configuration": (
        RecordDict({RECORD: ConfigRecord({HEADER: b"", TENSORS: b""})}),
        "must hold arrays, got a ConfigRecord",
    ),
    "no tensors": (arrays(tensors=None), "must have the arrays 'header' and 'tensors', got 'header'"),
    "an array too many": (arrays(more=Array(torch.zeros(3).numpy())), "got 'header', 'tensors', 'more'"),
    "another array": (arrays(tensors=Array(torch.zeros(3).numpy())), "got the dtype 'float32'"),
    "a shape that lies": (
        arrays(tensors=Array("bytes", (10**12,), "peft-ravan.message", b"abc")),
        "must hold 3 bytes",
    ),
    "a pickle": (arrays(header=Array("bytes", (2,), "pickle", b"N.")), "the type 'pickle'"),
    "an empty header": (arrays(header=Array("bytes", (0,), "peft-ravan.message", b"")), "does not have the length"),
    "a header that lies": (
        arrays(header=Array("bytes", (9,), "peft-ravan.message", b"\xff" * 9)),
        "does not have the length",
    ),
    "a task": (to_record(ClientTask(1, "north", {}, seed=1)), "is not a ClientReply"),
}


@pytest.mark.parametrize("content, problem", HOSTILE.values(), ids=HOSTILE)
def test_a_record_that_is_no_reply_is_refused(content, problem):
    with pytest.raises(MessageError) as raised:
        from_record(content, ClientReply)
    assert problem in str(raised.value) and len(str(raised.value)) < 500


@examples(200)
@given(any_content)
def test_any_record_is_refused_with_the_same_error(content):
    with pytest.raises(MessageError):
        from_record(content, ClientReply)


@examples(200)
@given(st.data())
def test_a_damaged_reply_is_refused_or_is_another_valid_reply(data):
    record = to_record(example())[RECORD]
    name = data.draw(st.sampled_from([HEADER, TENSORS]))
    damaged = bytearray(record[name].data)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(damaged[: data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))])
    try:
        reply = from_record(
            arrays(**{name: Array("bytes", (len(damaged),), "peft-ravan.message", damaged)}), ClientReply
        )
    except MessageError:
        return
    assert isinstance(reply, ClientReply)
