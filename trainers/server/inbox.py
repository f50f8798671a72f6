"""Receives the replies of a round: which ones are accepted, and which clients failed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from transformers.utils import logging

from peft_ravan.merging import ClientUpdate

from ..exchange import ClientReply, ClientTask
from ..messages import MessageError
from .rounds import Round
from .settings import ServerSettings


logger = logging.get_logger(__name__)


class Inbox:
    """
    Receives the replies of a round and records the clients that failed.

    Args:
        this_round ([`Round`]): The round. Clients that fail are recorded there.
        tasks (`Mapping[str, ClientTask]`): Client names to the tasks they were sent.

    **Attributes**:
        - **this_round** ([`Round`]) -- The round.
        - **kept_digests** (`dict[str, str | None]`) -- Client names to the digests of the files that clients keep.
    """

    def __init__(self, this_round: Round, tasks: Mapping[str, ClientTask]):
        self.this_round, self._tasks = this_round, tasks
        self._arrived: set[str] = set()
        self.kept_digests: dict[str, str | None] = {}

    def taken(self, replies: Iterable[ClientReply]) -> Iterator[ClientReply]:
        """
        Args:
            replies (`Iterable[ClientReply]`): The replies.

        Yields:
            [`ClientReply`]: The first reply to each task, if it has an update. A reply is released once the next one
            is requested.
        """
        for reply in replies:
            if not self._is_expected(reply):
                logger.warning(
                    f"Round {self.this_round.round_number}: a reply in the name of {reply.client!r} is left out. It is not the "
                    f"first one to a task of this round (it is of round {reply.round_number}, attempt {reply.attempt})."
                )
                continue
            self._arrived.add(reply.client)
            reason = reply.failure
            try:
                self.this_round.upload_bytes += reply.num_bytes
            except MessageError as error:
                reason = reason or f"{type(error).__name__}: {error}"
            if reason is None and reply.update is None:
                reason = "It has uploaded nothing."
            if reason is not None:
                self._fail(reply.client, reason, reply.error)
                continue
            self.kept_digests[reply.client] = reply.kept_digest
            yield reply
            del reply

    def update_of(self, reply: ClientReply, settings: ServerSettings) -> ClientUpdate:
        """
        Record an accepted reply.

        Args:
            reply ([`ClientReply`]): The reply.
            settings ([`ServerSettings`]): How rounds are run.

        Returns:
            [`~peft_ravan.merging.ClientUpdate`]: Its update, with the number of examples that it counts with.
        """
        if reply.learning_rate is not None:
            self.this_round.learning_rate = reply.learning_rate
        counted = settings.merging.limits.counted(reply.num_examples)
        update = ClientUpdate(reply.update, counted, reply.client, reply.trained_heads)
        self.this_round.add(update, reply.train_loss, count_heads=settings.client_budgets is not None)
        return update

    def miss_the_others(self) -> None:
        """Record the clients that did not reply as failed."""
        for client in [client for client in self._tasks if client not in self._arrived]:
            self._fail(client, "It has not replied.", None)

    def _is_expected(self, reply: ClientReply) -> bool:
        task = self._tasks.get(reply.client)
        return task is not None and reply.answers(task) and reply.client not in self._arrived

    def _fail(self, client: str, reason: str, error: Exception | None) -> None:
        self.this_round.fail(client, reason, error)
        logger.warning(f"Round {self.this_round.round_number}: client {client!r} failed and is left out. {reason}")
