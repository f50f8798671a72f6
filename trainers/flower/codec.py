"""
Tasks and replies as Flower's records.

A record carries the bytes of a message and nothing else. They are cut in two: the header, in which the tasks of a round
differ, and the tensors, which they often share. Flower splits arrays into chunks of a few megabytes and stores equal
chunks once, so the state of a round is brought to its object store once and not once per client.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TypeVar

from flwr.app import Array, ArrayRecord, RecordDict

from ..messages import MAX_HEADER_BYTES, Message, MessageError


# the name of the record, and of the two arrays in it
RECORD = "peft-ravan"
HEADER, TENSORS = "header", "tensors"
# how Flower describes the arrays: bytes, which it does not interpret
_DTYPE, _STYPE = "bytes", "peft-ravan.message"
_LENGTH_BYTES = 8  # safetensors begins with the length of its header

AnyMessage = TypeVar("AnyMessage", bound=Message)


def to_record(message: Message) -> RecordDict:
    """
    Args:
        message ([`Message`]): A message, such as a task or a reply.

    Returns:
        `flwr.app.RecordDict`: The content of a message of Flower.
    """
    data = message.to_bytes()
    end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    return RecordDict({RECORD: ArrayRecord({HEADER: bytes_array(data[:end]), TENSORS: bytes_array(data[end:])})})


def to_records(messages: Iterable[Message]) -> Iterator[RecordDict]:
    """
    Args:
        messages (`Iterable[Message]`): Messages that often have the same tensors, such as the tasks of a round.

    Yields:
        `flwr.app.RecordDict`: The content of a message of Flower for each. Equal tensors are kept in memory once.
    """
    last = None
    for message in messages:
        record = to_record(message)
        if last is not None and last.data == record[RECORD][TENSORS].data:
            record[RECORD][TENSORS] = last
        last = record[RECORD][TENSORS]
        yield record


def from_record(content: RecordDict, kind: type[AnyMessage]) -> AnyMessage:
    """
    Args:
        content (`flwr.app.RecordDict`): The content of a message of Flower. It may come from an untrusted source.
        kind (`type[Message]`): The message that it must be, such as [`ClientReply`].

    Returns:
        The message.

    Raises:
        MessageError: if it is anything else. Its records are compared with what is expected before any of them is read.
    """
    if len(content) != 1 or RECORD not in content:  # there may be any number, so they are not read
        raise MessageError(f"A message of Flower must have the record {RECORD!r} and no other, got {_some(content)}.")
    record = content[RECORD]
    if not isinstance(record, ArrayRecord):
        raise MessageError(f"The record {RECORD!r} must hold arrays, got a {type(record).__name__}.")
    if set(record) != {HEADER, TENSORS}:
        raise MessageError(
            f"The record {RECORD!r} must have the arrays {HEADER!r} and {TENSORS!r}, got {_some(record)}."
        )
    header, tensors = (bytes_of(record[name], name) for name in (HEADER, TENSORS))
    if len(header) > _LENGTH_BYTES + MAX_HEADER_BYTES:
        raise MessageError(f"The header of the message is above {MAX_HEADER_BYTES:,} bytes.")
    if len(header) != _LENGTH_BYTES + int.from_bytes(header[:_LENGTH_BYTES], "little"):
        raise MessageError("The header of the message does not have the length that it says.")
    return kind.from_bytes(header + tensors)


def bytes_array(data: bytes) -> Array:
    """
    Args:
        data (`bytes`): Any bytes.

    Returns:
        `flwr.app.Array`: An array that holds them as they are.
    """
    return Array(_DTYPE, (len(data),), _STYPE, data)


def bytes_of(array: Array, name: str) -> bytes:
    """
    Args:
        array (`flwr.app.Array`): An array. It may come from an untrusted source.
        name (`str`): Its name, for the error.

    Returns:
        `bytes`: The bytes that [`bytes_array`] was given.

    Raises:
        MessageError: if it is another array.
    """
    found = (array.dtype, array.stype, tuple(array.shape))
    if found != (_DTYPE, _STYPE, (len(array.data),)):
        raise MessageError(
            f"The array {name!r} must hold {len(array.data)} bytes of a message, got the dtype {found[0]!r:.50}, the type "
            f"{found[1]!r:.50} and the shape {found[2]!r:.50}."
        )
    return array.data


def _some(names: Collection[str]) -> str:
    first = ", ".join(f"{name!r:.50}" for name, _ in zip(names, range(3), strict=False))
    return f"{first} and {len(names) - 3:,} more" if len(names) > 3 else first or "none"
