"""Carries the tasks of a round to the nodes of their clients, and the replies back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from flwr.app import Message, Metadata, RecordDict
from transformers.utils import logging

from ..exchange import ClientReply, ClientTask
from ..messages import MAX_TEXT_LENGTH, MessageError
from ..runners.one_by_one import Runner, Work
from .answers import content_of
from .codec import from_record, to_records
from .introduction import LOST_BASES
from .nodes import Nodes


logger = logging.get_logger(__name__)


class Courier:
    """
    Turns the tasks of a round into messages of Flower, and the answers into replies. Whatever goes wrong on the way to
    a client, at its node or on the way back becomes a reply that says so, and costs only this client.

    Args:
        nodes ([`Nodes`]): The nodes of the clients.
        timeout (`float`): The seconds that nodes have for a round.
    """

    def __init__(self, nodes: Nodes, timeout: float):
        self.nodes, self.timeout = nodes, timeout
        self._tasks: Sequence[ClientTask] = ()
        self._sent: dict[str, Metadata] = {}

    def messages(self, tasks: Sequence[ClientTask]) -> list[Message]:
        """
        Args:
            tasks (`Sequence[ClientTask]`): The tasks of a round.

        Returns:
            `list[flwr.app.Message]`: A message for each client whose node is connected. They expire with the round.
        """
        self._tasks = tasks
        node_ids = self._reached(tasks) if tasks else {}
        reached = [task for task in tasks if task.client in node_ids]
        number = str(tasks[0].round_number) if tasks else ""
        messages = [
            Message(content, node_ids[client], self.nodes.message_type(client), ttl=self.timeout, group_id=number)
            for client, content in zip((task.client for task in reached), self._contents(reached), strict=True)
        ]
        # Flower gives a message its id when it is sent
        self._sent = {task.client: message.metadata for task, message in zip(reached, messages, strict=True)}
        return messages

    def replies(self, answers: Iterable[Message]) -> Iterator[ClientReply]:
        """
        Args:
            answers (`Iterable[flwr.app.Message]`): The answers to these messages, in any order. They may come from
                untrusted sources. A list is emptied, so that each answer is released once it was read: Flower would keep
                it until it has those of the next round.

        Yields:
            [`ClientReply`]: A reply to each task, in the order of the tasks, so that sums over clients are the same bit for
            bit in every run.
        """
        # the answers of lost nodes have the id of the SuperLink, so answers are known by what they answer
        by_message = {answer.metadata.reply_to_message_id: answer for answer in reversed(list(answers))}
        if isinstance(answers, list):
            answers.clear()
        tasks, sent = self._tasks, self._sent
        self._tasks, self._sent = (), {}
        for task in tasks:
            metadata = sent.get(task.client)
            if metadata is None:
                yield ClientReply.to(task, failure="Its node is not connected.")
                continue
            yield self._reply(task, by_message.pop(metadata.message_id, None))
        if by_message:
            logger.warning(f"{len(by_message)} answers to other messages than those of the round are left out.")

    def exchange(self, tasks: Sequence[ClientTask]) -> Iterator[ClientReply]:
        """
        Args:
            tasks (`Sequence[ClientTask]`): Tasks.

        Yields:
            [`ClientReply`]: The replies to them, as of [`Courier.replies`].
        """
        messages = self.messages(tasks)
        yield from self.replies(self.nodes.grid.send_and_receive(messages, timeout=self.timeout) if messages else ())

    def _reached(self, tasks: Sequence[ClientTask]) -> dict[str, int]:
        """The clients that are sent their tasks, and the ids of their nodes."""
        return self.nodes.connected()

    def _contents(self, tasks: Sequence[ClientTask]) -> Iterator[RecordDict]:
        """What is sent to them."""
        return to_records(tasks)

    def _reply(self, task: ClientTask, answer: Message | None) -> ClientReply:
        try:
            content = content_of(answer, self.timeout)
        except MessageError as error:
            return ClientReply.to(task, failure=str(error)[:MAX_TEXT_LENGTH])
        try:
            reply = from_record(content, ClientReply)
        except MessageError as error:
            return ClientReply.to(task, failure=f"Its reply cannot be read. {error}"[:MAX_TEXT_LENGTH])
        if not reply.answers(task):
            return ClientReply.to(
                task,
                failure=f"It has replied to another task: of client {reply.client!r:.100}, round {reply.round_number}, attempt "
                f"{reply.attempt} and run {reply.run!r:.100}.",
            )
        if reply.failure == LOST_BASES:
            self.nodes.send_bases_again(task.client)
        return reply


class GridRunner(Runner):
    """
    Runs tasks at the nodes of Flower.

    Args:
        courier ([`Courier`]): Carries tasks and replies.
    """

    def __init__(self, courier: Courier):
        self._courier = courier

    def run(self, tasks: Sequence[ClientTask], work: Work) -> Iterator[ClientReply]:
        """
        Args:
            tasks (`Sequence[ClientTask]`): The tasks.
            work (`Callable`): Not used: the nodes do the work.

        Yields:
            [`ClientReply`]: The replies.
        """
        yield from self._courier.exchange(tasks)
