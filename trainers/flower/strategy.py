"""The rounds of a server as a strategy of Flower."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from transformers.utils import logging

from ..exchange import ClientReply, ClientTask
from ..server.server import Server
from .courier import Courier


logger = logging.get_logger(__name__)

NO_WRAPPER = (
    "Flower's wrappers for differential privacy cannot clip what clients send, and their noise is calibrated for a uniform mean, "
    "which most merge methods are not. Leave the wrapper out, and use `privacy` of the arguments."
)


class StateElsewhere(ArrayRecord):
    """The arrays that Flower passes from round to round: there are none, since the server has the global state."""

    def to_numpy_ndarrays(self, *, keep_input: bool = True) -> list:
        """
        Raises:
            ValueError: always. Wrappers that clip call it.
        """
        raise ValueError(f"The arrays of a federation are not passed from round to round. {NO_WRAPPER}")


class FederatedStrategy(Strategy):
    """
    The rounds of a [`Server`] as a strategy of Flower, which calls `configure_train` to open a round and
    `aggregate_train` to close it. A round that has to be repeated with other clients is repeated within
    `aggregate_train`, so a round of Flower is always a round of the server. Rounds go on after the last one in the
    state of the server.

    The global state stays with the server: the arrays that Flower passes from round to round are empty.

    Args:
        server ([`Server`]): The server.
        courier ([`Courier`]): Carries tasks and replies.
        on_open (`Callable[[list[ClientTask]], None]`, *optional*): Called with the tasks of each attempt at a round.
        on_reply (`Callable[[Iterable[ClientReply]], Iterator[ClientReply]]`, *optional*): What replies go through.
        on_close (`Callable[[dict], None]`, *optional*): Called with the record of each round.
        is_over (`Callable[[], bool]`, *optional*): Whether the remaining rounds are left out.
    """

    def __init__(
        self,
        server: Server,
        courier: Courier,
        *,
        on_open: Callable[[list[ClientTask]], None] | None = None,
        on_reply: Callable[[Iterable[ClientReply]], Iterator[ClientReply]] | None = None,
        on_close: Callable[[dict[str, Any]], None] | None = None,
        is_over: Callable[[], bool] | None = None,
    ):
        self.server, self.courier = server, courier
        self._on_open, self._on_reply, self._on_close, self._is_over = on_open, on_reply, on_close, is_over
        self._before = server.state.round  # the rounds that were run before this start
        self._is_open = False

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """
        Open a round.

        Args:
            server_round (`int`): The round of Flower, from 1.
            arrays (`flwr.app.ArrayRecord`): Not used.
            config (`flwr.app.ConfigRecord`): Empty.
            grid (`flwr.serverapp.Grid`): Not used: the courier has it.

        Returns:
            `list[flwr.app.Message]`: The tasks. Empty if too few clients are available, or if the run is over.

        Raises:
            ValueError: if something wants to configure the clients.
        """
        if config:  # wrappers that let clients clip write into it, and the tasks have no place for it
            raise ValueError(
                f"The configuration of the strategy must be empty, got {', '.join(config)!r:.200}. {NO_WRAPPER}"
            )
        self._is_open = self._is_over is None or not self._is_over()
        return self._opened(self._before + server_round) if self._is_open else []

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[None, MetricRecord | None]:
        """
        Close a round. If too few clients have succeeded, it is tried again with others at once.

        Args:
            server_round (`int`): The round of Flower, from 1.
            replies (`Iterable[flwr.app.Message]`): The answers of the nodes.

        Returns:
            `tuple[None, flwr.app.MetricRecord]`: No arrays, and what Flower shows of the round.

        Raises:
            RoundFailedError: if too few clients succeeded in all attempts.
        """
        if not self._is_open:
            return None, None
        round_number, self._is_open = self._before + server_round, False
        while (record := self._closed(round_number, replies)) is None:
            messages = self._opened(round_number)
            replies = self.courier.nodes.grid.send_and_receive(messages, timeout=self.courier.timeout)
        if self._on_close is not None:
            self._on_close(record)
        shown = {"clients": len(record["clients"]), "failed-clients": len(record["failed_clients"])}
        loss = {"train-loss": record["train_loss"]} if "train_loss" in record else {}
        return None, MetricRecord({**shown, "num-examples": record["num_examples"], **loss})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """The adapter is evaluated by the server, if it has data."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        """There is nothing to aggregate."""

    def summary(self) -> None:
        """Log how the rounds are run."""
        settings = self.server.settings
        logger.info(
            f"{len(settings.client_sizes)} clients with {sum(settings.client_sizes.values())} examples, merged by "
            f"{settings.merging.method}, after round {self._before}."
        )

    def _opened(self, round_number: int) -> list[Message]:
        tasks = self.server.open(round_number)
        if self._on_open is not None:
            self._on_open(tasks)
        return self.courier.messages(tasks)

    def _closed(self, round_number: int, answers: Iterable[Message]) -> dict[str, Any] | None:
        replies = self.courier.replies(answers)
        return self.server.close(round_number, replies if self._on_reply is None else self._on_reply(replies))
