"""Trains several clients of a round at once on one machine."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from transformers import Trainer, set_seed
from transformers.utils import logging

from ...exchange import ClientReply, ClientTask
from ...seeds import derive_seed
from ..local_client import LocalClient
from .computation import CommonModel, compute_gradients
from .lanes import Lane, ProcessState
from .parts import common_parts, own_layers
from .replica import ALONE, Call, Replica
from .rows import CannotBatchError
from .trial import try_part


logger = logging.get_logger(__name__)


class BatchError(RuntimeError):
    """Something that was computed for several clients at once has failed, and each of them has to train by itself."""


class ClientBatch:
    """
    Trains up to K clients at once. Each has a trainer of its own, with its own adapter, data, optimizer and seed. Their
    batches go through the common parts of the model together. They take turns in everything else.

    Args:
        client ([`LocalClient`]): The client around the trainer, which trains what cannot be trained at once.
        make_client (`Callable[[Trainer], LocalClient]`): Makes the same around a copy of the trainer.
        size (`int`): K.
    """

    def __init__(self, client: LocalClient, make_client: Callable[[Trainer], LocalClient], size: int):
        self._alone, self._make_client, self._size = client, make_client, size
        model = client.trainer.model
        self._parts = common_parts(model)
        self._layers = own_layers(model, self._parts)
        self._common = CommonModel(model, self._layers)
        self._tried: set[str] = set()
        self._replicas: list[Replica] = []
        self._clients: list[LocalClient] = []

    @classmethod
    def of(cls, client: LocalClient, make_client: Callable[[Trainer], LocalClient], size: int) -> ClientBatch | None:
        """
        Args:
            client, make_client, size: As for the class.

        Returns:
            [`ClientBatch`]: Trains K clients at once. `None` if K is 1.
        """
        return cls(client, make_client, size) if size > 1 else None

    def divided(self, tasks: Sequence[ClientTask]) -> list[Sequence[ClientTask]]:
        """
        Args:
            tasks (`Sequence[ClientTask]`): The tasks of a round.

        Returns:
            `list[Sequence[ClientTask]]`: The tasks of up to K clients each.
        """
        return [tasks[start : start + self._size] for start in range(0, len(tasks), self._size)]

    def train(self, tasks: Sequence[ClientTask]) -> list[ClientReply]:
        """
        Run tasks of a round.

        Args:
            tasks (`Sequence[ClientTask]`): The tasks of at most K clients.

        Returns:
            `list[ClientReply]`: Their replies, in the same order.

        Raises:
            ClientStoreError: as for [`LocalClient.train`].
            UnsuitableModelError: if the model cannot compute several clients at once.
        """
        if len(tasks) == 1:
            return [self._alone.train(tasks[0])]
        replies = self._train_at_once(tasks)
        return [
            self._alone.train(task) if isinstance(reply.error, BatchError) else reply
            for task, reply in zip(tasks, replies, strict=True)
        ]

    def _train_at_once(self, tasks: Sequence[ClientTask]) -> list[ClientReply]:
        self._make_replicas(len(tasks))
        self._alone.trainer.model.train()
        device = self._alone.trainer.args.device
        lanes = []
        with self._closing(lanes):
            for task, client, replica in zip(tasks, self._clients, self._replicas, strict=False):
                replica.refresh()
                replica.lane = Lane(lambda lane, client=client, task=task: client.train(task), device)
                lanes.append(replica.lane)
            # what is random in the common parts differs from client to client, and depends on all of their seeds
            set_seed(derive_seed(tasks[0].seed, "batch", *(task.seed for task in tasks[1:])))
            self._run(lanes)
            replies = [lane.result() for lane in lanes]
        lanes[-1].state.restore()  # as if they had trained one after the other
        return replies

    def _make_replicas(self, number: int) -> None:
        for _ in range(len(self._replicas), number):
            replica = Replica(self._alone.trainer, self._parts, self._layers)
            self._replicas.append(replica)
            self._clients.append(self._make_client(replica.trainer))

    @contextlib.contextmanager
    def _closing(self, lanes: list[Lane]) -> Iterator[None]:
        try:
            yield
        finally:
            for lane in lanes:
                lane.stop()
            for replica in self._replicas:
                replica.lane = None

    def _run(self, lanes: Sequence[Lane]) -> None:
        common_state = ProcessState()
        answers = dict.fromkeys(lanes)
        while answers:
            for lane, answer in answers.items():
                lane.resume(answer)
                if lane.is_done:
                    lane.result()  # an error that is not of one client ends the run
            waiting = [lane for lane in lanes if not lane.is_done]
            calling = [lane for lane in waiting if isinstance(lane.request, Call)]
            common_state.restore()
            # gradients only once all have their losses, since all of these may depend on the same outputs
            answers = self._answer_calls(calling) if calling else self._answer_losses(waiting)
            common_state.take()

    def _answer_losses(self, lanes: Sequence[Lane]) -> dict[Lane, Exception | None]:
        if not lanes:
            return {}
        try:
            compute_gradients([lane.request.loss for lane in lanes])
        except Exception as error:
            return dict.fromkeys(lanes, self._failed(error, len(lanes)))
        return dict.fromkeys(lanes)

    def _answer_calls(self, lanes: Sequence[Lane]) -> dict[Lane, object]:
        """The outputs of the calls, or `ALONE` if they cannot be computed together with those of other clients."""
        replicas = {replica.lane: replica for replica in self._replicas}
        answers, groups = dict.fromkeys(lanes, ALONE), defaultdict(list)
        for lane in lanes:
            call = lane.request
            with contextlib.suppress(CannotBatchError):
                inputs = self._common.inputs_of(call)
                groups[call.part, call.with_gradients, call.autocast, inputs.kind()].append((lane, inputs))
        for group in groups.values():
            if len(group) == 1:
                continue
            members, inputs = zip(*group, strict=True)
            call, own = members[0].request, [replicas[lane] for lane in members]
            if call.part not in self._tried and try_part(self._common, call, inputs, own):
                self._tried.add(call.part)
            try:
                outputs = self._common.outputs(call, inputs, own)
            except Exception as error:
                self._failed(error, len(members))
            else:
                answers.update(zip(members, outputs, strict=True))
        return answers

    def _failed(self, error: Exception, number: int) -> BatchError:
        logger.warning_once(
            f"What {number} clients compute at once has failed, so each of them computes it by itself, which takes longer. If "
            f"this happens often, set `client_batching=1`. {type(error).__name__}: {error}"
        )
        return BatchError(str(error))
