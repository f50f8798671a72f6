"""
The server's side of SecAgg+ with the mod of Flower at the clients: Bonawitz et al., CCS 2017, in which all clients of a
round are neighbours.

Flower's own server side is not used. It needs its legacy strategies, and a client that drops out before it has shared its
keys ends the round there, since the others are asked for shares that they do not have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.serverapp import Grid
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key, public_key_to_bytes

from .answers import answers, content_of
from .secure_masks import mask, pair_mask
from .secure_vector import MODULUS, SecureSumError, SumFormat


# far more than a key or a share needs
MAX_BYTES = 2**14
# how long nodes have for a message without training, of which they first start a process
KEY_SECONDS = 300.0


class SecureSum:
    """
    One sum over the vectors of the clients of a round, which are never seen without masks.

        secure = SecureSum(...)
        secure.agree()  # on keys, before the tasks are sent, with `secure.request(client)` next to each task
        secure.add(client, vector)  # for each client that has trained
        total = secure.unmasked()

    Clients that fail are left out. They cost only themselves as long as enough of the others stay until the end.

    Args:
        grid (`flwr.serverapp.Grid`): The grid.
        nodes (`Mapping[str, int]`): The clients, and the ids of their nodes.
        form ([`SumFormat`]): The format of the vectors.
        threshold (`int`): How many clients must stay until the end.
        timeout (`float`): How many seconds nodes have for a message without training.
        group_id (`str`): How Flower groups the messages.

    **Attributes**:
        - **nodes** (`dict[str, int]`) -- The clients, and the ids of their nodes.
        - **form** ([`SumFormat`]) -- The format of the vectors.
        - **failures** (`dict[str, str]`) -- The clients that have failed before or after their training, and why.
        - **sent_bytes** (`Counter[str]`) -- How many bytes each client has sent for keys and shares.
    """

    def __init__(
        self, grid: Grid, nodes: Mapping[str, int], form: SumFormat, threshold: int, timeout: float, group_id: str
    ):
        self._grid, self.nodes, self.form, self._threshold = grid, dict(nodes), form, threshold
        self._timeout, self._group_id = min(timeout, KEY_SECONDS), group_id
        self.failures: dict[str, str] = {}
        self.sent_bytes: Counter[str] = Counter()
        self._keys: dict[str, tuple[bytes, bytes]] = {}
        self._shares: dict[str, dict[int, bytes]] = {}  # what each client has sent for each other node
        self._summed: dict[str, None] = {}
        self._total = np.zeros(len(form), dtype=np.uint32)

    # ---- Before the training -----------------------------------------------------

    def agree(self) -> dict[str, int]:
        """
        Let the clients make keys and share them.

        Returns:
            `dict[str, int]`: The clients that can be given their tasks, and the ids of their nodes.

        Raises:
            SecureSumError: if they are too few.
        """
        setup = {
            Key.STAGE: Stage.SETUP,
            Key.SAMPLE_NUMBER: self.form.num_clients,
            Key.SHARE_NUMBER: self.form.num_clients,
            Key.THRESHOLD: self._threshold,
            Key.CLIPPING_RANGE: self.form.clipping_range,
            Key.TARGET_RANGE: MODULUS,
            Key.MOD_RANGE: MODULUS,
            Key.MAX_WEIGHT: float(self.form.num_examples),
        }
        self._keys = self._ask(dict.fromkeys(self.nodes, setup), lambda client, answer: _keys_of(answer))
        self._check_enough(self._keys)
        all_keys = {str(self.nodes[client]): list(keys) for client, keys in self._keys.items()}
        ids = {self.nodes[client] for client in self._keys}
        self._shares = self._ask(
            dict.fromkeys(self._keys, {Key.STAGE: Stage.SHARE_KEYS, **all_keys}),
            lambda client, answer: _shares_of(answer, ids - {self.nodes[client]}),
        )
        self._check_enough(self._shares)
        return {client: self.nodes[client] for client in self._shares}

    def request(self, client: str) -> ConfigRecord:
        """
        Args:
            client (`str`): A client that has shared its keys.

        Returns:
            `flwr.app.ConfigRecord`: What goes with its task: the shares of the others, which only it can read.
        """
        own = self.nodes[client]
        shares = {self.nodes[other]: shares[own] for other, shares in self._shares.items() if other != client}
        return ConfigRecord(
            {
                Key.STAGE: Stage.COLLECT_MASKED_VECTORS,
                Key.SOURCE_LIST: list(shares),
                Key.CIPHERTEXT_LIST: list(shares.values()),
            }
        )

    # ---- After the training ------------------------------------------------------

    def add(self, client: str, vector: np.ndarray) -> None:
        """
        Args:
            client (`str`): A client that was sent its task.
            vector (`np.ndarray`): Its vector with masks, of uint32.

        Raises:
            ValueError: if it is none. The client then counts as one that has dropped out.
        """
        if vector.dtype != np.uint32 or vector.shape != self._total.shape:
            raise ValueError(
                f"The masked vector must have {len(self._total)} words of 32 bits, got {vector.dtype} of the shape "
                f"{vector.shape}."
            )
        self._total += vector
        self._summed[client] = None

    def unmasked(self, least: int = 1) -> np.ndarray:
        """
        Remove the masks from the sum.

        Args:
            least (`int`, *optional*, defaults to 1): How many clients must be in the sum, if that is more than the threshold.
                With fewer, nothing is uncovered.

        Returns:
            `np.ndarray`: The sum of the vectors that were added, of uint32.

        Raises:
            SecureSumError: if too few clients were left, or if shares do not fit together.
        """
        self._check_enough(self._summed, max(least, self._threshold))
        active = [self.nodes[client] for client in self._summed]
        dead = [self.nodes[client] for client in self._shares if client not in self._summed]
        asked = {Key.STAGE: Stage.UNMASK, Key.ACTIVE_NODE_ID_LIST: active, Key.DEAD_NODE_ID_LIST: dead}
        # a client that fails here is in the sum already
        told = self._ask(
            dict.fromkeys(self._summed, asked), lambda client, answer: _secrets_of(answer, [*active, *dead])
        )
        self._check_enough(told)
        kept = list(told.values())[: self._threshold]
        total = self._total.copy()
        for client in self._shares:
            shares = [secrets[self.nodes[client]] for secrets in kept]
            try:
                total -= self._mask_of(client, combine_shares(shares))
            except Exception as error:  # anything can come of what untrusted nodes have sent
                raise SecureSumError(
                    f"The masks of {client!r} could not be removed, since the shares of its key do not fit together. One of the "
                    f"clients has sent a wrong one. ({type(error).__name__}: {error})"
                ) from error
        return total

    def _mask_of(self, client: str, secret: bytes) -> np.ndarray:
        """What is left of the masks of a client in the sum."""
        if client in self._summed:
            return mask(secret, len(self._total))
        if public_key_to_bytes(bytes_to_private_key(secret).public_key()) != self._keys[client][0]:
            raise ValueError("the private key is not that of its public key")
        left = np.zeros_like(self._total)
        for other in self._summed:
            shared = pair_mask(secret, self._keys[other][0], len(left))
            left += shared if self.nodes[other] > self.nodes[client] else -shared
        return left

    # ---- Messages ----------------------------------------------------------------

    def _ask(
        self,
        questions: Mapping[str, Mapping[str, Any]],
        read: Callable[[str, ConfigRecord], Any],
    ) -> dict[str, Any]:
        """What the clients answer, in their order, without those that fail."""
        messages = {
            self.nodes[client]: Message(
                RecordDict({RECORD_KEY_CONFIGS: ConfigRecord(dict(question))}),
                self.nodes[client],
                MessageType.TRAIN,
                ttl=self._timeout,
                group_id=self._group_id,
            )
            for client, question in questions.items()
        }
        found = {}
        for client, (_, answer) in zip(questions, answers(self._grid, messages, self._timeout), strict=True):
            try:
                record = _record_of(content_of(answer, self._timeout))
                self.sent_bytes[client] += len(record.deflate())
                found[client] = read(client, record)
            except ValueError as error:
                self.failures[client] = str(error)
        return found

    def _check_enough(self, clients: Mapping[str, Any], needed: int | None = None) -> None:
        needed = self._threshold if needed is None else needed
        if len(clients) < needed:
            reasons = "".join(f" {client!r}: {reason}" for client, reason in self.failures.items())
            raise SecureSumError(
                f"{len(clients)} of {self.form.num_clients} clients are left, and secure aggregation needs {needed} of them to "
                f"uncover their sum (`threshold`, `min_successful_clients`).{reasons}"
            )


# ---- What clients answer -----------------------------------------------------------


def _record_of(content: RecordDict) -> ConfigRecord:
    record = content.get(RECORD_KEY_CONFIGS) if len(content) == 1 else None
    if not isinstance(record, ConfigRecord):
        raise ValueError(
            "Its answer is none to a message of secure aggregation. Does its app have the same arguments?"
        )
    return record


def _keys_of(answer: ConfigRecord) -> tuple[bytes, bytes]:
    keys = tuple(answer.get(name) for name in (Key.PUBLIC_KEY_1, Key.PUBLIC_KEY_2))
    for key in keys:
        public_key = bytes_to_public_key(_some_bytes(key))  # raises a ValueError
        if not isinstance(public_key, EllipticCurvePublicKey) or not isinstance(public_key.curve, SECP384R1):
            raise ValueError("Its public key is of another kind.")
    if keys[0] == keys[1]:
        raise ValueError("Its two public keys are the same.")
    return keys


def _shares_of(answer: ConfigRecord, others: set[int]) -> dict[int, bytes]:
    return _by_node(answer.get(Key.DESTINATION_LIST), answer.get(Key.CIPHERTEXT_LIST), others)


def _secrets_of(answer: ConfigRecord, asked: list[int]) -> dict[int, bytes]:
    return _by_node(answer.get(Key.NODE_ID_LIST), answer.get(Key.SHARE_LIST), set(asked))


def _by_node(ids: Any, values: Any, expected: set[int]) -> dict[int, bytes]:
    if (
        not isinstance(ids, list)
        or not isinstance(values, list)
        or len(ids) != len(values)
        or len(ids) != len(expected)
    ):
        raise ValueError(f"It must send a share for each of {len(expected)} clients, and has not.")
    shares = {node_id: _some_bytes(value) for node_id, value in zip(ids, values, strict=True)}
    if shares.keys() != expected:
        raise ValueError("It has sent shares for other clients than those that it was asked for.")
    return shares


def _some_bytes(value: Any) -> bytes:
    if not isinstance(value, bytes) or len(value) > MAX_BYTES:
        raise ValueError(f"A key or a share must be up to {MAX_BYTES:,} bytes, got {value!r:.50}.")
    return value
