"""Has clients evaluated at their nodes, on data that stay there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from flwr.app import Message, MessageType
from transformers.utils import logging

from ..exchange import ClientTask
from ..messages import MessageError
from .answers import answers, content_of
from .codec import from_record, to_records
from .evaluation_reply import EvaluationReply
from .introduction import LOST_BASES
from .nodes import Nodes


logger = logging.get_logger(__name__)


def evaluated_at_nodes(
    nodes: Nodes, tasks: Sequence[ClientTask], timeout: float
) -> Iterator[tuple[str, dict[str, float]]]:
    """
    Evaluate clients at their nodes. Clients whose node is lost or replies with something else are left out with a warning,
    and so are those whose metrics have other names than those of most clients.

    Args:
        nodes ([`Nodes`]): The nodes.
        tasks (`Sequence[ClientTask]`): A task for each client, as of [`ModelInRounds.task`].
        timeout (`float`): How many seconds the nodes have.

    Yields:
        `tuple[str, dict[str, float]]`: The name of a client, and its metrics.
    """
    replies = list(_replies(nodes, tasks, timeout))
    counts = Counter(frozenset(reply.metrics) for reply in replies)
    usual = counts.most_common(1)[0][0] if counts else frozenset()
    for reply in replies:
        if reply.metrics.keys() != usual:
            _leave_out(
                reply.client, f"Its metrics are {sorted(reply.metrics)!s:.200}, and most have {sorted(usual)!s:.200}."
            )
            continue
        examples = {} if reply.examples is None else {"examples": reply.examples}
        yield reply.client, {**examples, **reply.metrics}


def _replies(nodes: Nodes, tasks: Sequence[ClientTask], timeout: float) -> Iterator[EvaluationReply]:
    connected = nodes.connected()
    reached = {connected[task.client]: task for task in tasks if task.client in connected}
    for task in tasks:
        if task.client not in connected:
            _leave_out(task.client, "Its node is not connected.")
    messages = {
        node_id: Message(
            content,
            node_id,
            nodes.message_type(task.client, MessageType.EVALUATE),
            ttl=timeout,
            group_id=str(task.round_number),
        )
        for (node_id, task), content in zip(reached.items(), to_records(reached.values()), strict=True)
    }
    for node_id, answer in answers(nodes.grid, messages, timeout):
        task = reached[node_id]
        try:
            reply = _read(answer, task, timeout)
        except MessageError as error:
            _leave_out(task.client, str(error))
            continue
        if reply.failure == LOST_BASES:
            nodes.send_bases_again(task.client)
        if reply.metrics is None:
            _leave_out(task.client, reply.failure or "It has no metrics.")
            continue
        yield reply


def _read(answer: Message | None, task: ClientTask, timeout: float) -> EvaluationReply:
    reply = from_record(content_of(answer, timeout), EvaluationReply)
    if (reply.client, reply.round_number) != (task.client, task.round_number):
        raise MessageError(f"It has replied for client {reply.client!r:.100} and round {reply.round_number}.")
    return reply


def _leave_out(client: str, reason: str) -> None:
    logger.warning(f"Client {client!r} was not evaluated and is not in the statistics. {reason:.500}")
