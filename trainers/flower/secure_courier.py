"""Carries the tasks of a round so that the server sees only the sum of what the clients upload."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from flwr.app import Message, RecordDict
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS
from transformers import TrainingArguments

from ..exchange import ClientReply, ClientTask, SummedReply
from ..messages import MAX_TEXT_LENGTH
from ..secure_aggregation import SecureAggregation
from .courier import Courier
from .nodes import Nodes
from .secure_sum import SecureSum
from .secure_vector import MASKED, MeanUpdate, SecureSumError, SumFormat


class SecureCourier(Courier):
    """
    A [`Courier`] for [`SecureAggregation`]. Before the tasks are sent, the clients agree on keys, and after they have
    replied, the masks are removed from the sum. Each client that is in the sum has a reply with the mean over all of them.

    Args:
        nodes ([`Nodes`]): The nodes of the clients.
        timeout (`float`): The seconds that nodes have for a round.
        args ([`FederatedArguments`]): The arguments, with `secure_aggregation`.
    """

    def __init__(self, nodes: Nodes, timeout: float, args: TrainingArguments):
        super().__init__(nodes, timeout)
        self._settings = SecureAggregation.parse(args.secure_aggregation)
        self._counted, self._least = args.merging.limits.counted, args.min_successful_clients
        self._learning_rate = args.learning_rate
        self._sum: SecureSum | None = None
        self._halted: str | None = None  # why the attempt at the round has failed as a whole

    def replies(self, answers: Iterable[Message]) -> Iterator[ClientReply]:
        """
        Args:
            answers (`Iterable[flwr.app.Message]`): The answers to the messages of a round. They may come from untrusted
                sources.

        Yields:
            [`ClientReply`]: A reply to each task, in the order of the tasks.
        """
        tasks, secure, self._sum = self._tasks, self._sum, None
        if secure is None:  # there are no tasks
            return
        failures, trained = {}, {}
        for reply in super().replies(answers):
            failure = self._added(secure, reply)
            if failure is None:
                trained[reply.client] = (reply.num_examples, reply.num_bytes, reply.kept_digest)
            else:
                failures[reply.client] = failure
            del reply
        mean = self._mean(secure, sum(self._counted(n) for n, *_ in trained.values()), len(tasks))
        for task in tasks:
            failure = failures.get(task.client) or self._halted
            if failure is not None:
                yield ClientReply.to(task, failure=failure[:MAX_TEXT_LENGTH])
                continue
            num_examples, num_bytes, kept_digest = trained[task.client]
            yield SummedReply.to(
                task,
                update=mean.change,
                num_examples=num_examples,
                trained_heads=mean.trained_heads,
                train_loss=mean.train_loss,
                learning_rate=self._learning_rate * task.learning_rate_factor,
                kept_digest=kept_digest,
                upload_dtype=task.upload_dtype,
                sent_bytes=num_bytes + secure.sent_bytes[task.client],
            )

    def _reached(self, tasks: Sequence[ClientTask]) -> dict[str, int]:
        connected = super()._reached(tasks)
        sizes = {task.client: self._counted(self.nodes.clients[task.client].num_examples) for task in tasks}
        form = SumFormat.of(tasks[0], len(tasks), sum(sizes.values()), self._settings.clipping_range)
        nodes = {task.client: connected[task.client] for task in tasks if task.client in connected}
        threshold, number = self._settings.shares_needed(len(tasks)), str(tasks[0].round_number)
        self._sum = SecureSum(self.nodes.grid, nodes, form, threshold, self.timeout, number)
        self._halted = None
        try:
            return self._sum.agree()
        except SecureSumError as error:
            self._halted = str(error)
            return {}

    def _contents(self, tasks: Sequence[ClientTask]) -> Iterator[RecordDict]:
        for task, content in zip(tasks, super()._contents(tasks), strict=True):
            content[RECORD_KEY_CONFIGS] = self._sum.request(task.client)
            yield content

    def _added(self, secure: SecureSum, reply: ClientReply) -> str | None:
        """Add the vector of a client to the sum, or say why it has failed."""
        if reply.client in secure.failures:
            return secure.failures[reply.client]
        if self._halted is not None and reply.client in secure.nodes:
            return self._halted
        if reply.failure is not None:
            return reply.failure
        try:
            secure.add(reply.client, self._words(reply))
        except ValueError as error:
            return str(error)
        return None

    def _words(self, reply: ClientReply) -> np.ndarray:
        expected = self.nodes.clients[reply.client].num_examples
        if reply.num_examples != expected:
            raise ValueError(
                f"It has {reply.num_examples} examples, and had {expected} before the first round, by which the sum is weighted."
            )
        vector = (reply.update or {}).get(MASKED)
        if not isinstance(vector, torch.Tensor) or vector.dtype != torch.int32 or len(reply.update) != 1:
            raise ValueError("It has not uploaded a masked vector.")
        return vector.numpy().view(np.uint32)

    def _mean(self, secure: SecureSum, num_examples: int, num_clients: int) -> MeanUpdate | None:
        if self._halted is not None:
            return None
        try:
            words = secure.unmasked(least=min(self._least, num_clients))
            return secure.form.unpack(words, num_examples)
        except SecureSumError as error:
            self._halted = str(error)
            return None
