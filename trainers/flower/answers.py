"""What nodes answer, and why an answer is none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from ..messages import MessageError
from .codec import from_record
from .introduction import Introduction


class NodeError(Exception):
    """Why a node is left out, as the rest of a sentence about it."""


def answers(grid: Grid, messages: Mapping[int, Message], timeout: float) -> Iterator[tuple[int, Message | None]]:
    """
    Args:
        grid (`flwr.serverapp.Grid`): The grid.
        messages (`Mapping[int, flwr.app.Message]`): A message for each node, by its id.
        timeout (`float`): How many seconds to wait for the answers.

    Yields:
        `tuple[int, flwr.app.Message]`: The answer of each node, or `None` if it has given none in time.
    """
    if not messages:
        return
    found = {
        answer.metadata.reply_to_message_id: answer
        for answer in grid.send_and_receive(list(messages.values()), timeout=timeout)
    }
    for node_id, message in messages.items():
        yield node_id, found.get(message.metadata.message_id)


def content_of(answer: Message | None, timeout: float) -> RecordDict:
    """
    Args:
        answer (`flwr.app.Message`, *optional*): The answer of a node. It may come from an untrusted source.
        timeout (`float`): How many seconds it was waited for.

    Returns:
        `flwr.app.RecordDict`: What is in it.

    Raises:
        MessageError: if there is no answer, or the node reports an error.
    """
    if answer is None:
        raise MessageError(f"Its node has not replied within {timeout:g} seconds.")
    if answer.has_error():
        raise MessageError(f"Its node reports an error: {answer.error.reason}")
    return answer.content


def introduction_in(answer: Message | None, asked: str) -> Introduction:
    """
    Args:
        answer (`flwr.app.Message`, *optional*): The answer of a node. It may come from an untrusted source.
        asked (`str`): What the node was asked to do, such as `"introduced itself"`.

    Returns:
        [`Introduction`]: What the node says of itself.

    Raises:
        NodeError: if there is no answer, or one that says something else.
    """
    if answer is None:
        raise NodeError(f"has not {asked} in time.")
    if answer.has_error():
        raise NodeError(f"has not {asked}: {answer.error.reason!s:.500}.")
    try:
        return from_record(answer.content, Introduction)
    except MessageError as error:
        raise NodeError(f"has not {asked} as a client does. {error}") from error
