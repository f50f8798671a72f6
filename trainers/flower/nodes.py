"""The nodes of a federation: which of them is which client, and who is connected."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

import torch
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from transformers.utils import logging

from peft_ravan.sharing.federation_record import current_versions

from ..messages import MessageError
from .codec import from_record
from .introduction import Introduction, check_same_adapter


logger = logging.get_logger(__name__)

POLL_SECONDS = 1.0


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

    def connected(self) -> dict[str, int]:
        """
        Returns:
            `dict[str, int]`: The clients whose nodes are connected now, and the ids of these nodes.
        """
        now = set(self.grid.get_node_ids())
        missing = [client for client in self.clients if self._ids[client] not in now]
        if missing and now - self._asked.keys():  # one of the new nodes may be a missing one that was started again
            self._introduce(now, self.timeout, known_only=True)
        return {client: node_id for client, node_id in self._ids.items() if node_id in now}

    def _introduce(self, node_ids: Iterable[int], timeout: float, known_only: bool = False) -> None:
        new = sorted(set(node_ids) - self._asked.keys())
        if not new:
            return
        questions = [Message(RecordDict(), node_id, MessageType.QUERY) for node_id in new]
        answers = self.grid.send_and_receive(questions, timeout=max(timeout, POLL_SECONDS))
        by_question = {answer.metadata.reply_to_message_id: answer for answer in answers}
        for node_id, question in zip(new, questions, strict=True):
            self._asked[node_id] = self._take(node_id, by_question.get(question.metadata.message_id), known_only)
            if self._asked[node_id]:
                logger.warning(self._asked[node_id])

    def _take(self, node_id: int, answer: Message | None, known_only: bool) -> str:
        """Take a node in, or return the reason why it is left out."""
        if answer is None:
            return f"Node {node_id} has not introduced itself in time."
        if answer.has_error():
            return f"Node {node_id} could not introduce itself: {answer.error.reason!s:.500}."
        try:
            introduction = from_record(answer.content, Introduction)
        except MessageError as error:
            return f"Node {node_id} has not introduced itself as a client does. {error}"
        client = introduction.client
        if known_only and client not in self.clients:
            return (
                f"Node {node_id} is {client!r}, which was not there when the run began, and does not take part in it."
            )
        if self._ids.get(client) in set(self.grid.get_node_ids()):
            raise ValueError(
                f"Two nodes have the name {client!r}. Start each with a name of its own, such as "
                "`--node-config 'client-name=\"north\"'`."
            )
        check_same_adapter(self._frozen, introduction)
        own, theirs = (given.get("peft-ravan") for given in (current_versions(), introduction.versions))
        if own != theirs:
            logger.warning(f"The node of {client!r} has peft-ravan {theirs!s:.40}, and the server {own}.")
        self._ids[client] = node_id
        self.clients.setdefault(client, introduction)
        return ""
