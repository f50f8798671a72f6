"""
The update of a client as one vector of 32-bit words, made so that the sum of the vectors of several clients, modulo
2^32, is the sum of their updates:

    n | n * has_loss, loss | n * mask of each head of each core | change of each tensor

The words of the first three parts are exact, except for the loss. The change x of a client with n of the N examples of all
clients of the round is the integer nearest to x * n/N * scale. The weights n/N sum to 1, so no sum leaves the range of 32
bits if no entry leaves `clipping_range`. The mean over clients then differs from the exact one by at most

    C * clipping_range / 2^32 * N/n'

with C clients in the round and n' examples of those that are in the sum, or that have trained the head. For 10 clients, a
clipping range of 8 and no dropouts this is 2e-8.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from peft_ravan.merging import UpdateError
from peft_ravan.tuner.state import has_part, is_core

from ..exchange import ClientReply, ClientTask


# the name of the vector in the update of a reply
MASKED = "masked"
MODULUS = 2**32
# half of the words stand for negative numbers
LIMIT = MODULUS // 2
# a mean loss that is larger, or not a number, is not in the sum
LOSS_RANGE = 1024.0


class SecureSumError(RuntimeError):
    """The sum over the clients of a round could not be uncovered, or is none of valid updates."""


class MeanUpdate(NamedTuple):
    """
    What a server learns of the updates of a round.

    Args:
        change (`dict[str, torch.Tensor]`): The mean changes. Of a core only the heads that anyone has trained.
        trained_heads (`dict[str, torch.Tensor]`): Which heads these are, for the cores with others.
        train_loss (`float`): The mean training loss, NaN if no client has a loss that could be summed.
    """

    change: dict[str, torch.Tensor]
    trained_heads: dict[str, torch.Tensor]
    train_loss: float


@dataclass(frozen=True)
class SumFormat:
    """
    What stands where in the vectors of a round, and their units.

    Args:
        shapes (`Mapping[str, tuple[int, ...]]`): The tensors of an update, by their checkpoint names.
        num_clients (`int`): The number of clients in the round, C.
        num_examples (`int`): The number of their examples, N.
        clipping_range (`float`): The largest absolute value of an entry of a change.

    Raises:
        ValueError: if there are too many clients or examples for 32 bits.
    """

    shapes: Mapping[str, tuple[int, ...]]
    num_clients: int
    num_examples: int
    clipping_range: float

    def __post_init__(self):
        if not 0 < self.num_examples < MODULUS or not 0 < self.num_clients < 2**16:
            raise ValueError(
                f"A masked sum has 32 bits, which are too few for {self.num_clients:,} clients with {self.num_examples:,} "
                "examples. Limit the examples that count with `max_examples`, or let fewer clients take part."
            )

    @classmethod
    def of(cls, task: ClientTask, num_clients: int, num_examples: int, clipping_range: float) -> SumFormat:
        """
        Args:
            task ([`ClientTask`]): The task of any client of the round.
            num_clients (`int`): The number of clients in the round.
            num_examples (`int`): The number of their examples.
            clipping_range (`float`): The largest absolute value of an entry of a change.

        Returns:
            [`SumFormat`]: The format of the vectors of the round.
        """
        # sorted, since a message orders tensors by their dtypes
        names = sorted(name for name in task.state if not has_part(name, task.frozen))
        shapes = {name: tuple(task.state[name].shape) for name in names}
        return cls(shapes, num_clients, num_examples, clipping_range)

    def __len__(self) -> int:
        return 3 + sum(self._heads.values()) + sum(map(math.prod, self.shapes.values()))

    # ---- At a client -------------------------------------------------------------

    def pack(self, reply: ClientReply, counted: int) -> np.ndarray:
        """
        Args:
            reply ([`ClientReply`]): The reply of a client, with changes.
            counted (`int`): The number of examples that it counts with.

        Returns:
            `np.ndarray`: Its vector, of uint32.

        Raises:
            UpdateError: if the update has other tensors, or an entry that is NaN, infinite or out of range.
        """
        if reply.update.keys() != self.shapes.keys():
            other = min(reply.update.keys() ^ self.shapes.keys())
            raise UpdateError(
                f"tensor {other!r}: is {'not expected in' if other in reply.update else 'missing from'} the update."
            )
        if not 0 < counted <= self.num_examples:
            raise UpdateError(f"It counts with {counted} examples, and all clients together with {self.num_examples}.")
        has_loss = abs(reply.train_loss) <= LOSS_RANGE  # false for NaN
        share = counted / self.num_examples
        loss = np.rint(reply.train_loss * share * self._scale(LOSS_RANGE)) if has_loss else 0
        words = [np.array([counted, counted * has_loss, loss], dtype=np.float64)]
        masks = {name: self._mask(reply, name) for name in self._heads}
        words += [counted * mask.astype(np.float64) for mask in masks.values()]
        for name, shape in self.shapes.items():
            change = self._checked(name, reply.update[name], masks.get(name))
            whole = np.zeros(shape)
            whole[masks.get(name, ...)] = change
            words.append(np.rint(whole.ravel() * (share * self._scale(self.clipping_range))))
        # to int64 first: a negative float has no defined value as an unsigned integer
        return np.concatenate(words).astype(np.int64).astype(np.uint32)

    def _mask(self, reply: ClientReply, name: str) -> np.ndarray:
        mask = (reply.trained_heads or {}).get(name)
        return np.ones(self._heads[name], dtype=bool) if mask is None else mask.cpu().numpy()

    def _checked(self, name: str, tensor: torch.Tensor, mask: np.ndarray | None) -> np.ndarray:
        shape = self.shapes[name] if mask is None else (int(mask.sum()), *self.shapes[name][1:])
        if not tensor.is_floating_point() or tuple(tensor.shape) != shape:
            raise UpdateError(
                f"tensor {name!r}: must be floating point with the shape {shape} to be summed, got {tensor.dtype} with the "
                f"shape {tuple(tensor.shape)}."
            )
        change = tensor.detach().to("cpu", torch.float64).numpy()
        if not (np.abs(change) <= self.clipping_range).all():  # false for NaN
            # the value is not named, since the server reads this
            raise UpdateError(
                f"tensor {name!r}: its change has entries that are NaN, infinite or beyond ±{self.clipping_range:g}, which a "
                "masked sum cannot hold. If the training has not diverged, raise `clipping_range` of `secure_aggregation`."
            )
        return change

    # ---- At the server -----------------------------------------------------------

    def unpack(self, words: np.ndarray, counted: int) -> MeanUpdate:
        """
        Args:
            words (`np.ndarray`): The sum of the vectors of some clients, of uint32.
            counted (`int`): The number of examples that they count with together.

        Returns:
            [`MeanUpdate`]: Their mean update.

        Raises:
            SecureSumError: if it cannot be a sum of vectors of such clients.
        """
        parts = self._parts(words)
        own, with_loss, loss = next(parts).tolist()
        if own != counted or with_loss > counted:
            raise SecureSumError(
                f"The sum says that its clients have {own} examples, and they have said {counted}. One of them has not sent "
                "what it should, or has sent a wrong share of a key."
            )
        train_loss = float(_signed(loss) * self._unit(LOSS_RANGE, with_loss)) if with_loss else math.nan
        counts = {name: next(parts).astype(np.int64) for name in self._heads}
        trained_heads, change = {}, {}
        for name, shape in self.shapes.items():
            summed = _signed(next(parts)).reshape(shape)
            heads = counts.get(name, np.array(counted))
            self._check_range(name, summed, heads, counted)
            if name in counts and not heads.all():
                trained_heads[name] = torch.from_numpy(heads > 0)
                summed, heads = summed[heads > 0], heads[heads > 0]
            change[name] = torch.from_numpy(summed * _by_head(self._unit(self.clipping_range, heads), summed))
        return MeanUpdate(change, trained_heads, train_loss)

    def _check_range(self, name: str, summed: np.ndarray, heads: np.ndarray, counted: int) -> None:
        """What no valid updates can sum to shows that a client has sent something else."""
        most = self._scale(self.clipping_range) * self.clipping_range * heads / self.num_examples
        most = np.where(heads > 0, most + self.num_clients, 0)
        if (heads > counted).any() or (np.abs(summed) > _by_head(most, summed)).any():
            raise SecureSumError(
                f"tensor {name!r}: its sum is beyond what changes up to ±{self.clipping_range:g} can sum to. One of the clients "
                "has not sent what it should, or has sent a wrong share of a key."
            )

    # ---- Words -------------------------------------------------------------------

    @property
    def _heads(self) -> dict[str, int]:
        return {name: shape[0] for name, shape in self.shapes.items() if is_core(name) and shape}

    def _parts(self, words: np.ndarray) -> Iterator[np.ndarray]:
        start = 0
        for size in (3, *self._heads.values(), *map(math.prod, self.shapes.values())):
            yield words[start : start + size]
            start += size

    def _scale(self, largest: float) -> float:
        """How many words stand for 1. Rounding adds up to half a word for each client."""
        return (LIMIT - self.num_clients) / largest

    def _unit(self, largest: float, counted: np.ndarray | int) -> np.ndarray:
        """What one word of a sum over clients with so many examples stands for in their mean."""
        return np.asarray(self.num_examples / counted / self._scale(largest))


def _signed(words: np.ndarray | int) -> np.ndarray:
    return np.asarray(words, dtype=np.uint32).view(np.int32).astype(np.float64)


def _by_head(values: np.ndarray, tensor: np.ndarray) -> np.ndarray:
    """One value for each head, or one for all, in a shape that multiplies the tensor, `[h, 1, 1]` or `[1, 1]`."""
    return values.reshape(*values.shape, *[1] * (tensor.ndim - values.ndim))
