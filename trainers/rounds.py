"""What happens between the clients' trainings: who takes part, with which seed and learning rate, and what is recorded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from transformers import get_scheduler
from transformers.trainer_utils import IntervalStrategy

from peft_ravan.merging import ClientUpdate


if TYPE_CHECKING:
    from .arguments import FederatedArguments


def derive_seed(seed: int, *names: str | int) -> int:
    """
    Derive the seed of one random choice from the seed of the run and the choice's name, so that no choice depends on
    how many were made before it.

    Args:
        seed (`int`): The seed of the run.
        *names (`str` or `int`): The name of the choice, such as `"client", round, client_id`.

    Returns:
        `int`: A seed below 2**32, which numpy, torch and Python accept.
    """
    digest = hashlib.sha256("/".join(str(part) for part in (seed, *names)).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def learning_rate_factors(args: FederatedArguments) -> list[float]:
    """
    What `lr_scheduler_type` makes of the learning rate over the rounds.

    Args:
        args ([`FederatedArguments`]): The arguments, of which the schedule and `num_rounds` are read.

    Returns:
        `list[float]`: The factor of the learning rate for each round.
    """
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(args.num_rounds),
        num_training_steps=args.num_rounds,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    factors = []
    for _ in range(args.num_rounds):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


def is_due(strategy: str, every: float, number: int, last: int, also_last: bool = False) -> bool:
    """
    Whether something is done after a round.

    Args:
        strategy (`str`): `"epoch"` for every round, `"steps"` for every `every` rounds; anything else for none.
        every (`float`): The number of rounds, or if below 1 the share of all rounds.
        number (`int`): The number of the round, from 1.
        last (`int`): The number of the last round.
        also_last (`bool`, *optional*, defaults to `False`): Whether `"steps"` includes the last round.

    Returns:
        `bool`: Whether it is due.
    """
    if strategy == IntervalStrategy.EPOCH:
        return True
    if strategy == IntervalStrategy.STEPS:
        interval = max(1, round(every * last)) if every < 1 else int(every)
        return number % interval == 0 or (also_last and number == last)
    return False


def serialized_bytes(state: Mapping[str, torch.Tensor]) -> int:
    """
    Args:
        state (`Mapping[str, torch.Tensor]`): Tensors by name.

    Returns:
        `int`: The size of the tensors as a safetensors file, in bytes.
    """
    return len(safetensors.torch.save(dict(state)))


@dataclass
class Round:
    """
    One round, as it goes on.

    Args:
        number (`int`): The number of the round, from 1.
        clients (`list[str]`): The clients that take part.
        updates (`list[ClientUpdate]`): What they have uploaded so far.
        train_losses (`list[float]`): Their mean local training losses.
        learning_rate (`float`): The learning rate of the round, of the optimizer's first parameter group.
        upload_bytes (`int`): What they have sent, serialised.
        download_bytes (`int`): What they have been sent, serialised.
    """

    number: int
    clients: list[str]
    updates: list[ClientUpdate] = field(default_factory=list)
    train_losses: list[float] = field(default_factory=list)
    learning_rate: float = 0.0
    upload_bytes: int = 0
    download_bytes: int = 0

    def add(self, update: ClientUpdate, train_loss: float) -> None:
        """
        Args:
            update ([`ClientUpdate`]): What a client uploaded.
            train_loss (`float`): Its mean local training loss.
        """
        self.updates.append(update)
        self.train_losses.append(train_loss)
        self.upload_bytes += serialized_bytes(update.state)

    def record(self) -> dict[str, Any]:
        """
        Returns:
            `dict[str, Any]`: What the history says of the round. A round in which nobody trained has no loss and no
            learning rate.
        """
        num_examples = [update.num_examples for update in self.updates]
        record = {
            "round": self.number,
            "clients": list(self.clients),
            "num_examples": sum(num_examples),
            "upload_bytes": self.upload_bytes,
            "download_bytes": self.download_bytes,
        }
        if not self.updates:
            return record
        weighted = sum(loss * n for loss, n in zip(self.train_losses, num_examples, strict=True))
        return {**record, "train_loss": weighted / sum(num_examples), "learning_rate": self.learning_rate}


def mean_train_loss(history: Sequence[Mapping[str, Any]], args: FederatedArguments) -> float:
    """
    Args:
        history (`Sequence[Mapping[str, Any]]`): The records of the rounds.
        args ([`FederatedArguments`]): The arguments, for the error.

    Returns:
        `float`: The mean training loss over the rounds in which clients trained.

    Raises:
        RuntimeError: if there was none.
    """
    losses = [record["train_loss"] for record in history if "train_loss" in record]
    if not losses:
        raise RuntimeError(
            f"Nothing was trained: in none of the {len(history)} rounds were min_clients={args.min_clients} clients "
            "available. Use a smaller `min_clients`, more rounds, or look into `availability`."
        )
    return sum(losses) / len(losses)
