"""The nodes of a federation: which of them is which client, and who is connected."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from transformers.utils import logging

from peft_ravan.sharing.federation_record import current_versions

from .answers import NodeError, answers, introduction_in
from .codec import to_record
from .frozen_parts import FrozenParts
from .introduction import BASES_ACTION, ON_SENT_BASES_ACTION, Introduction


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

    A node that does not fit is left out with a warning, and never ends the run. A name belongs to the node that gives it
    first, as long as this node is connected. If several nodes give a name at the same time, none of them gets it, since
    any choice among them would be by chance.

    Args:
        grid (`flwr.serverapp.Grid`): The grid that connects them.
        frozen ([`FrozenParts`]): What is frozen in the server's adapter.
        timeout (`float`): How many seconds to wait for nodes, and for their introductions.

    **Attributes**:
        - **clients** (`dict[str, Introduction]`) -- What the nodes have said of themselves, by the names of the clients.
    """

    def __init__(self, grid: Grid, frozen: FrozenParts, timeout: float):
        self.grid, self.timeout = grid, timeout
        self.clients: dict[str, Introduction] = {}
        self._frozen = frozen
        self._ids: dict[str, int] = {}
        # the nodes that were asked, each with the connected nodes for whose sake it has not got its name
        self._asked: dict[int, Collection[int]] = {}
        self._left_out: dict[int, str] = {}
        self._on_sent_bases: set[int] = set()
        self._have_lost_bases: set[int] = set()

    def wait(self, least: int) -> None:
        """
        Wait until enough nodes are connected and have introduced themselves. More may take part.

        Args:
            least (`int`): How many.

        Raises:
            TooFewNodesError: if fewer were there in time. It says why others were left out.
        """
        deadline = time.monotonic() + self.timeout
        while True:
            self._introduce(deadline - time.monotonic())
            if len(self.clients) >= least:
                break
            if time.monotonic() >= deadline:
                problems = "".join(f" {reason}" for reason in self._left_out.values())
                raise TooFewNodesError(
                    f"The federation needs {least} nodes (`min_nodes`), and {len(self.clients)} were there within "
                    f"{self.timeout:g} seconds (`node_timeout`).{problems} Start more nodes, wait longer, or ask for fewer."
                )
            time.sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))
        self.clients = dict(sorted(self.clients.items()))
        logger.info(f"{len(self.clients)} nodes take part: {', '.join(self.clients)}.")

    def share(self, parts: Mapping[str, torch.Tensor], fingerprints: Mapping[str, torch.Tensor]) -> None:
        """
        Send bases that nodes cannot make for themselves, now and to nodes that are started again.

        Args:
            parts (`Mapping[str, torch.Tensor]`): What is frozen in the server's adapter, see [`frozen_parts`].
            fingerprints (`Mapping[str, torch.Tensor]`): Its fingerprints.
        """
        self._frozen.send_to_all(parts, fingerprints)
        self._send_bases(self.connected().values(), self.timeout)

    def connected(self) -> dict[str, int]:
        """
        Returns:
            `dict[str, int]`: The clients whose nodes are connected now, and the ids of these nodes.
        """
        now = set(self.grid.get_node_ids())
        timeout = min(self.timeout, MAX_SECONDS_BETWEEN_ROUNDS)
        if any(self._ids.get(client) not in now for client in self.clients):
            self._introduce(timeout, known_only=True)  # a new node may be a missing one that was started again
        self._send_bases(sorted(self._have_lost_bases & now), timeout)
        self._have_lost_bases.clear()
        return {client: node_id for client, node_id in self._ids.items() if node_id in now}

    def message_type(self, client: str, category: str = MessageType.TRAIN) -> str:
        """
        Args:
            client (`str`): The name of a client.
            category (`str`, *optional*): What its node has to do, as Flower names it. By default it trains.

        Returns:
            `str`: The type of a message about it, which also says whether the node needs the bases that it was sent.
        """
        return f"{category}.{ON_SENT_BASES_ACTION}" if self._ids.get(client) in self._on_sent_bases else category

    def send_bases_again(self, client: str) -> None:
        """
        Send a node the bases again before the next task.

        Args:
            client (`str`): The name of its client, which has lost them.
        """
        if self._ids.get(client) in self._on_sent_bases:
            self._have_lost_bases.add(self._ids[client])

    # ---- Introductions -----------------------------------------------------------

    def _introduce(self, timeout: float, known_only: bool = False) -> None:
        def check(introduction: Introduction) -> None:
            if known_only and introduction.client not in self.clients:
                raise NodeError(
                    f"is {introduction.client!r}, which was not there when the run began, and does not take part in it."
                )
            self._frozen.check_made(introduction)

        questions = {node_id: Message(RecordDict(), node_id, MessageType.QUERY) for node_id in self._not_asked()}
        said = self._introductions(questions, "introduced itself", timeout, check)
        needing = [node_id for node_id, introduction in said.items() if self._frozen.must_be_sent_to(introduction)]
        confirmed = self._send_bases(needing, timeout)
        self._take({node_id: said[node_id] for node_id in said if node_id not in needing or node_id in confirmed})

    def _not_asked(self) -> list[int]:
        """The nodes that have not been asked since they were connected, or have not got a name that is free again."""
        now = set(self.grid.get_node_ids())
        self._asked = {
            node_id: rivals
            for node_id, rivals in self._asked.items()
            if node_id in now and (not rivals or not now.isdisjoint(rivals))
        }
        new = sorted(now - self._asked.keys())
        self._asked.update(dict.fromkeys(new, ()))
        return new

    def _take(self, introduced: Mapping[int, Introduction]) -> None:
        now = set(self.grid.get_node_ids())
        by_name: dict[str, set[int]] = {}
        for node_id, introduction in introduced.items():
            by_name.setdefault(introduction.client, self._holder(introduction.client) & now).add(node_id)
        for node_id, introduction in introduced.items():
            client = introduction.client
            if self._holder(client) == {node_id}:
                continue  # it was gone for a moment
            if rivals := by_name[client] - {node_id}:
                self._asked[node_id] = rivals
                self._leave_out(
                    node_id,
                    f"has the name {client!r}, which node {min(rivals)} has as well. Start each with a name of its own, such "
                    "as `--node-config 'client-name=\"north\"'`.",
                )
                continue
            own, theirs = (given.get("peft-ravan") for given in (current_versions(), introduction.versions))
            if own != theirs:
                logger.warning(f"The node of {client!r} has peft-ravan {theirs!s:.40}, and the server {own}.")
            self._ids[client] = node_id
            self.clients.setdefault(client, introduction)
            self._left_out.pop(node_id, None)

    def _holder(self, client: str) -> set[int]:
        return {self._ids[client]} if client in self._ids else set()

    def _leave_out(self, node_id: int, reason: str) -> None:
        client = next((client for client, own_id in self._ids.items() if own_id == node_id), None)
        self._ids.pop(client, None)
        self._left_out[node_id] = f"Node {node_id}{'' if client is None else f', of {client!r},'} {reason}"
        logger.warning(self._left_out[node_id])

    # ---- Messages ----------------------------------------------------------------

    def _send_bases(self, node_ids: Iterable[int], timeout: float) -> Collection[int]:
        """Returns the nodes that have taken them."""
        node_ids = list(node_ids)
        if not node_ids:
            return ()
        content, kind = to_record(self._frozen.message), f"{MessageType.TRAIN}.{BASES_ACTION}"
        messages = {node_id: Message(content, node_id, kind) for node_id in node_ids}
        taken = self._introductions(messages, "taken the bases", timeout, self._frozen.check)
        self._on_sent_bases.update(taken)
        return taken

    def _introductions(
        self, messages: Mapping[int, Message], asked: str, timeout: float, check: Callable[[Introduction], None]
    ) -> dict[int, Introduction]:
        """What nodes answer. Those that do not answer, or whose introduction does not pass the check, are left out."""
        introductions = {}
        for node_id, answer in answers(self.grid, messages, max(timeout, POLL_SECONDS)):
            try:
                introduction = introduction_in(answer, asked)
                check(introduction)
            except NodeError as error:
                self._leave_out(node_id, str(error))
            except ValueError as error:
                self._leave_out(node_id, f"is left out. {error}")
            else:
                introductions[node_id] = introduction
        return introductions
