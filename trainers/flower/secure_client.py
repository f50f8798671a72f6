"""
Secure aggregation at a client: Flower's SecAgg+ mod agrees on keys and shares them, and this file masks the update.

Flower's mod would clip values in silence, upload 8 bytes for each, and make its masks from too few bits, see
`secure_masks.py`. So it is given no update: it takes the shares of the others, and the masks are made here from its keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.client.mod.secure_aggregation.secaggplus_mod import SecAggPlusState
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, RECORD_KEY_STATE, Key, Stage
from flwr.compat.common.recorddict_compat import fitres_to_recorddict

from peft_ravan.merging import UpdateError

from ..exchange import ClientReply, ClientTask
from ..secure_aggregation import MIN_CLIENTS, SecureAggregation
from .codec import from_record, to_record
from .secure_masks import mask, pair_mask
from .secure_vector import MASKED, MODULUS, SumFormat


class MaskingClient:
    """
    A client whose updates leave its node only with masks. It follows the server as far as its own arguments allow.

    Args:
        settings ([`SecureAggregation`]): The settings, from the client's own arguments.
        counted (`Callable[[int], int]`): With how many examples a client counts that has so many.
        train (`Callable[[ClientTask], ClientReply]`): Trains, and replies with changes.
    """

    def __init__(
        self,
        settings: SecureAggregation,
        counted: Callable[[int], int],
        train: Callable[[ClientTask], ClientReply],
    ):
        self.settings, self._counted, self._train = settings, counted, train

    def answer(self, message: Message, context: Context) -> Message:
        """
        Args:
            message (`flwr.app.Message`): A message of one of the stages of SecAgg+. It may come from an untrusted source.
            context (`flwr.app.Context`): The context of the node, which keeps the keys until the end of the round.

        Returns:
            `flwr.app.Message`: The answer.

        Raises:
            ValueError: if the server asks for less protection than the arguments, or for something out of turn.
        """
        if message.metadata.message_type != MessageType.TRAIN:  # Flower's mod would pass on others, and check nothing
            raise ValueError(
                f"A message of secure aggregation must be of the type {MessageType.TRAIN!r}, got "
                f"{message.metadata.message_type!r:.50}."
            )
        configs = message.content.get(RECORD_KEY_CONFIGS)
        if not isinstance(configs, ConfigRecord):
            raise ValueError(
                "The server asks for an update that is not masked, but the arguments of this node have `secure_aggregation`. "
                "Give the server and all nodes the same arguments."
            )
        stage = configs.get(Key.STAGE)
        if stage == Stage.COLLECT_MASKED_VECTORS:
            return Message(to_record(self._masked_reply(message, context, configs)), reply_to=message)
        if stage == Stage.SETUP:
            self._check_setup(configs)
        elif stage == Stage.UNMASK:
            _check_shares_asked(configs, message.metadata.dst_node_id)
        answer = secaggplus_mod(message, context, _nothing_to_train)
        if stage == Stage.UNMASK:
            del context.state[RECORD_KEY_STATE]  # the keys are of no more use
        return answer

    def _check_setup(self, configs: Mapping[str, Any]) -> None:
        num_clients = configs.get(Key.SAMPLE_NUMBER)
        if type(num_clients) is not int or num_clients < MIN_CLIENTS:
            raise ValueError(
                f"A masked sum needs at least {MIN_CLIENTS} clients, and the server has {num_clients!r:.50}."
            )
        expected = {
            Key.SHARE_NUMBER: num_clients,
            Key.THRESHOLD: self.settings.shares_needed(num_clients),
            Key.CLIPPING_RANGE: self.settings.clipping_range,
            Key.MOD_RANGE: MODULUS,
        }
        for name, value in expected.items():
            if configs.get(name) != value:
                raise ValueError(
                    f"The server sets {name!r} of secure aggregation to {configs.get(name)!r:.50}, and by the arguments of this "
                    f"node it is {value} for {num_clients} clients. Give the server and all nodes the same arguments."
                )

    def _masked_reply(self, message: Message, context: Context, configs: ConfigRecord) -> ClientReply:
        content = RecordDict({name: record for name, record in message.content.items() if name != RECORD_KEY_CONFIGS})
        task = from_record(content, ClientTask)
        if (task.purpose, task.upload_dtype) != ("train", "float32"):
            raise ValueError(
                "Only changes of a round in float32 can be masked, and the server asks for "
                f"{task.upload_dtype or 'whole tensors'} ({task.purpose})."
            )
        sources = list(configs.get(Key.SOURCE_LIST, ()))
        if len(set(sources)) < len(sources):
            raise ValueError("The server names a client twice, with which this one would share a mask.")
        trained: list[ClientReply] = []

        def train(message: Message, context: Context) -> Message:
            trained.append(self._train(task))
            if trained[0].failure is not None:
                raise _TrainingFailedError
            return _no_update(message)

        try:
            secaggplus_mod(message, context, train)
        except _TrainingFailedError:
            return trained[0]
        state = SecAggPlusState(**context.state.config_records[RECORD_KEY_STATE])
        return self._masked(task, trained[0], state, sources)

    def _masked(self, task: ClientTask, reply: ClientReply, state: SecAggPlusState, others: list[int]) -> ClientReply:
        form = SumFormat.of(task, state.sample_num, round(state.max_weight), state.clipping_range)
        try:
            words = form.pack(reply, self._counted(reply.num_examples))
        except UpdateError as error:
            return ClientReply.to(task, failure=str(error))
        words += mask(state.rd_seed, len(words))
        for other in others:
            shared = pair_mask(state.sk1, state.public_keys_dict[other][0], len(words))
            words += shared if state.nid > other else -shared
        return ClientReply.to(
            task,
            update={MASKED: torch.from_numpy(words.view(np.int32))},
            num_examples=reply.num_examples,
            # that it has kept something is known from the arguments, and what it is stays with the client
            kept_digest=None if reply.kept_digest is None else "",
        )


class _TrainingFailedError(Exception):
    """Ends the stage in Flower's mod, so that its state stays as it was."""


def _check_shares_asked(configs: Mapping[str, Any], own: int) -> None:
    """
    Check that the server does not ask for both secrets of a client: with the seed of its own mask and its private key, it
    could uncover its update. Flower's mod does not check this.
    """
    active, dead = (list(configs.get(name, ())) for name in (Key.ACTIVE_NODE_ID_LIST, Key.DEAD_NODE_ID_LIST))
    asked = [*active, *dead]
    if len(set(asked)) < len(asked) or own not in active:
        raise ValueError(
            "The server asks for two secrets of one client, or takes this one for a client that has dropped out. It gets none."
        )


def _no_update(message: Message) -> Message:
    nothing = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([]), num_examples=0, metrics={})
    return Message(fitres_to_recorddict(nothing, keep_input=False), reply_to=message)


def _nothing_to_train(message: Message, context: Context) -> Message:
    raise ValueError("The server asks for an update out of turn.")
