"""The nodes of a federation: which of them is which client, and who is connected."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping

import torch
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from transformers.utils import logging

from peft_ravan.sharing.federation_record import current_versions

from ..messages import MessageError
from .codec import from_record, to_record
from .introduction import BASES_ACTION, Bases, Introduction, check_same_adapter


logger = logging.get_logger(__name__)

POLL_SECONDS = 1.0
# between rounds, the others wait for a node that introduces itself again
MAX_SECONDS_BETWEEN_ROUNDS = 120.0


class TooFewNodesError(RuntimeError):
    """Fewer nodes than the federation needs were there in time."""


class Nodes:
    """
    The nodes that take part. Each introduces itself once. The id that Flower gives to a node changes when it is started
    again, so clients are known by the names that they have given.

    Args:
        grid (`flwr.serverapp.Grid`): The grid that connects them.
        frozen (`Mapping[str, torch.Tensor]`): The fingerprints of the server's adapter, see [`frozen_fingerprints`].
        timeout (`float`): How many seconds to wait for nodes, and for their introductions.

    **Attributes**:
        - **clients** (`dict[str, Introduction]`) -- What the nodes have said of themselves, by the names of the clients.
    """

    def __init__(self, grid: Grid, frozen: Mapping[str, torch.Tensor], timeout: float):
        self.grid, self.timeout = grid, timeout
        self.clients: dict[str, Introduction] = {}
        self._frozen = frozen
        self._ids: dict[str, int] = {}
        self._bases: Bases | None = None
        self._frozen_with_bases = frozen
        self._asked: dict[int, str] = {}  # the nodes that were asked, with the reasons why they are left out

    def wait(self, least: int) -> None:
        """
        Wait until enough nodes are connected and have introduced themselves. More may take part.

        Args:
            least (`int`): How many.

        Raises:
            TooFewNodesError: if fewer were there in time.
            ValueError: if two nodes have the same name, or if the adapter of a node is another one.
        """
        deadline = time.monotonic() + self.timeout
        while True:
            self._introduce(self.grid.get_node_ids(), deadline - time.monotonic())
            if len(self.clients) >= least:
                break
            if time.monotonic() >= deadline:
                problems = "".join(f" {reason}" for reason in self._asked.values() if reason)
                raise TooFewNodesError(
                    f"The federation needs {least} nodes (`min_nodes`), and {len(self.clients)} were there within "
                    f"{self.timeout:g} seconds (`node_timeout`).{problems} Start more nodes, wait longer, or ask for fewer."
                )
            time.sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))
        self.clients = dict(sorted(self.clients.items()))
        logger.info(f"{len(self.clients)} nodes take part: {', '.join(self.clients)}.")

    def share(self, bases: Mapping[str, torch.Tensor], frozen: Mapping[str, torch.Tensor]) -> None:
        """
        Send bases that nodes cannot make for themselves, now and to nodes that are started again.

        Args:
            bases (`Mapping[str, torch.Tensor]`): The bases.
            frozen (`Mapping[str, torch.Tensor]`): The fingerprints of the server's adapter with these bases.
        """
        self._bases, self._frozen_with_bases = Bases(bases), frozen
        self._send_bases(self.connected())

    def connected(self) -> dict[str, int]:
        """
        Returns:
            `dict[str, int]`: The clients whose nodes are connected now, and the ids of these nodes.
        """
        now = set(self.grid.get_node_ids())
        missing = [client for client in self.clients if self._ids.get(client) not in now]
        if missing and now - self._asked.keys():  # one of the new nodes may be a missing one that was started again
            before = dict(self._ids)
            self._introduce(now, min(self.timeout, MAX_SECONDS_BETWEEN_ROUNDS), known_only=True)
            again = {client: node_id for client, node_id in self._ids.items() if before.get(client) != node_id}
            if self._bases is not None and again:
                self._send_bases(again)
        return {client: node_id for client, node_id in self._ids.items() if node_id in now}

    def _introduce(self, node_ids: Iterable[int], timeout: float, known_only: bool = False) -> None:
        new = sorted(set(node_ids) - self._asked.keys())
        questions = {node_id: Message(RecordDict(), node_id, MessageType.QUERY) for node_id in new}
        for node_id, answer in self._answers(questions, timeout):
            try:
                self._take(node_id, answer, known_only)
                self._asked[node_id] = ""
            except NodeError as error:
                self._asked[node_id] = f"Node {node_id} {error}"
                logger.warning(self._asked[node_id])

    def _send_bases(self, node_ids: Mapping[str, int]) -> None:
        content, clients = to_record(self._bases), {node_id: client for client, node_id in node_ids.items()}
        messages = {node_id: Message(content, node_id, f"train.{BASES_ACTION}") for node_id in clients}
        for node_id, answer in self._answers(messages, self.timeout):
            try:
                check_same_adapter(self._frozen_with_bases, _introduction(answer))
            except (NodeError, ValueError) as error:
                logger.warning(f"Node {node_id}, of {clients[node_id]!r}, has not taken the bases. It {error}")
                del self._ids[clients[node_id]]

    def _answers(self, messages: Mapping[int, Message], timeout: float) -> Iterator[tuple[int, Message | None]]:
        """The answer of each node, or `None` if it has given none in time."""
        if not messages:
            return
        answers = self.grid.send_and_receive(list(messages.values()), timeout=max(timeout, POLL_SECONDS))
        by_message = {answer.metadata.reply_to_message_id: answer for answer in answers}
        for node_id, message in messages.items():
            yield node_id, by_message.get(message.metadata.message_id)

    def _take(self, node_id: int, answer: Message | None, known_only: bool) -> None:
        introduction = _introduction(answer)
        client = introduction.client
        if known_only and client not in self.clients:
            raise NodeError(f"is {client!r}, which was not there when the run began, and does not take part in it.")
        try:
            if self._ids.get(client) in set(self.grid.get_node_ids()):
                raise ValueError(
                    f"Two nodes have the name {client!r}. Start each with a name of its own, such as "
                    "`--node-config 'client-name=\"north\"'`."
                )
            check_same_adapter(self._frozen, introduction)
        except ValueError as error:
            if known_only:  # the run goes on without it
                raise NodeError(f"does not take part. {error}") from error
            raise
        own, theirs = (given.get("peft-ravan") for given in (current_versions(), introduction.versions))
        if own != theirs:
            logger.warning(f"The node of {client!r} has peft-ravan {theirs!s:.40}, and the server {own}.")
        self._ids[client] = node_id
        self.clients.setdefault(client, introduction)


class NodeError(Exception):
    """Why a node is left out, as the rest of a sentence about it."""


def _introduction(answer: Message | None) -> Introduction:
    if answer is None:
        raise NodeError("has not introduced itself in time.")
    if answer.has_error():
        raise NodeError(f"could not introduce itself: {answer.error.reason!s:.500}.")
    try:
        return from_record(answer.content, Introduction)
    except MessageError as error:
        raise NodeError(f"has not introduced itself as a client does. {error}") from error
