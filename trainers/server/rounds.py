"""What a round is: its learning rate, what happens after it, the bytes of what is sent, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import IntervalStrategy

from peft_ravan.merging import ClientUpdate
from peft_ravan.tuner.state import is_core

from .serialized import serialized_bytes


def learning_rate_factors(args: TrainingArguments, num_rounds: int) -> list[float]:
    """
    What `lr_scheduler_type` makes of the learning rate over the rounds.

    Args:
        args ([`~transformers.TrainingArguments`]): The arguments, of which the schedule is read.
        num_rounds (`int`): The number of rounds.

    Returns:
        `list[float]`: The factor of the learning rate for each round.
    """
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(num_rounds),
        num_training_steps=num_rounds,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    factors = []
    for _ in range(num_rounds):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


def is_due(strategy: str, every: float, round_number: int, last: int, also_last: bool = False) -> bool:
    """
    Whether something is done after a round.

    Args:
        strategy (`str`): `"epoch"` for every round, `"steps"` for every `every` rounds; anything else for none.
        every (`float`): The number of rounds, or if below 1 the share of all rounds.
        round_number (`int`): The round, from 1.
        last (`int`): The number of the last round.
        also_last (`bool`, *optional*, defaults to `False`): Whether `"steps"` includes the last round.

    Returns:
        `bool`: Whether it is due.
    """
    if strategy == IntervalStrategy.EPOCH:
        return True
    if strategy == IntervalStrategy.STEPS:
        interval = max(1, round(every * last)) if every < 1 else int(every)
        return round_number % interval == 0 or (also_last and round_number == last)
    return False


@dataclass
class Round:
    """
    One round, as it goes on.

    Args:
        round_number (`int`): The round, from 1.
        clients (`list[str]`): The clients that take part.
        num_examples (`dict[str, int]`): The examples of the clients that have uploaded.
        train_losses (`dict[str, float]`): Their mean local training losses.
        heads_trained (`dict[str, int]`): How many heads they trained, if not all.
        clipped (`list[str]`): The clients whose updates were scaled down to `max_update_norm`.
        failures (`dict[str, str]`): The clients that failed, and why, in this and earlier attempts at the round.
        first_error (`Exception`, *optional*): The error of the first of them.
        attempts (`int`): How often the round was tried, this time included.
        learning_rate (`float`): The learning rate of the round, of the optimizer's first parameter group.
        upload_bytes (`int`): What clients have sent, serialised, also in attempts that failed.
        download_bytes (`int`): What they have been sent.
    """

    round_number: int
    clients: list[str]
    num_examples: dict[str, int] = field(default_factory=dict)
    train_losses: dict[str, float] = field(default_factory=dict)
    heads_trained: dict[str, int] = field(default_factory=dict)
    clipped: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    first_error: Exception | None = None
    attempts: int = 1
    learning_rate: float = 0.0
    upload_bytes: int = 0
    download_bytes: int = 0

    def add(self, update: ClientUpdate, train_loss: float, count_heads: bool = False) -> None:
        """
        Args:
            update ([`ClientUpdate`]): What a client uploaded.
            train_loss (`float`): Its mean local training loss.
            count_heads (`bool`, *optional*, defaults to `False`): Whether to say how many heads it trained.
        """
        self.num_examples[update.client_id] = update.num_examples
        self.train_losses[update.client_id] = train_loss
        if count_heads:
            self.heads_trained[update.client_id] = sum(
                len(t) for name, t in update.state.items() if is_core(name) and t.dim()
            )
        self.upload_bytes += serialized_bytes(update.state)

    def fail(self, client: str, reason: str, error: Exception | None = None) -> None:
        """
        Args:
            client (`str`): The client that failed. What it has uploaded does not count.
            reason (`str`): Why.
            error (`Exception`, *optional*): The error.
        """
        self.failures[client] = reason
        self.num_examples.pop(client, None)
        self.train_losses.pop(client, None)
        self.heads_trained.pop(client, None)
        self.first_error = self.first_error or error

    def failed(self) -> str:
        """
        Returns:
            `str`: Who failed and why, for a message.
        """
        return "Failed: " + "; ".join(f"{client!r} ({reason})" for client, reason in self.failures.items()) + "."

    def again(self, clients: list[str]) -> Round:
        """
        Args:
            clients (`list[str]`): The clients that take part in the next attempt.

        Returns:
            [`Round`]: The next attempt.
        """
        return Round(
            self.round_number,
            clients,
            failures=self.failures,
            first_error=self.first_error,
            attempts=self.attempts + 1,
            upload_bytes=self.upload_bytes,
            download_bytes=self.download_bytes,
        )

    def record(self) -> dict[str, Any]:
        """
        Returns:
            `dict[str, Any]`: What the history says of the round. A round in which nobody trained has no loss and no
            learning rate.
        """
        total = sum(self.num_examples.values())
        record = {
            "round": self.round_number,
            "clients": list(self.num_examples),
            "failed_clients": [{"client": client, "reason": reason} for client, reason in self.failures.items()],
            "attempts": self.attempts,
            "num_examples": total,
            "upload_bytes": self.upload_bytes,
            "download_bytes": self.download_bytes,
        }
        if self.heads_trained:
            record["heads_trained"] = list(self.heads_trained.values())
        if self.clipped:
            record["clipped_clients"] = self.clipped
        if not total:
            return record
        weighted = sum(self.train_losses[client] * n for client, n in self.num_examples.items())
        return {**record, "train_loss": weighted / total, "learning_rate": self.learning_rate}


def mean_train_loss(history: Sequence[Mapping[str, Any]], min_clients: int) -> float:
    """
    Args:
        history (`Sequence[Mapping[str, Any]]`): The records of the rounds.
        min_clients (`int`): How many clients a round needs, for the error.

    Returns:
        `float`: The mean training loss over the rounds in which clients trained.

    Raises:
        RuntimeError: if there was none.
    """
    losses = [record["train_loss"] for record in history if "train_loss" in record]
    if not losses:
        raise RuntimeError(
            f"Nothing was trained: in none of the {len(history)} rounds were min_clients={min_clients} clients "
            "available. Use a smaller `min_clients`, more rounds, or look into `availability`."
        )
    return sum(losses) / len(losses)
