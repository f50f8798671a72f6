"""The schedule of a federation: the learning rate of its rounds, what is due after a round, and the mean loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import IntervalStrategy


def learning_rate_factors(args: TrainingArguments, num_rounds: int) -> list[float]:
    """
    Compute the learning rate schedule over the rounds from `lr_scheduler_type`.

    Args:
        args ([`~transformers.TrainingArguments`]): The arguments that define the schedule.
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
    Check whether something is due after a round.

    Args:
        strategy (`str`): `"epoch"` for every round, `"steps"` for every `every` rounds, anything else for never.
        every (`float`): The number of rounds, or if below 1, a share of all rounds.
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


def mean_train_loss(history: Sequence[Mapping[str, Any]], min_clients: int) -> float:
    """
    Args:
        history (`Sequence[Mapping[str, Any]]`): The records of the rounds.
        min_clients (`int`): How many clients a round needs, for the error message.

    Returns:
        `float`: The mean training loss over the rounds in which clients trained.

    Raises:
        RuntimeError: if there was no such round.
    """
    losses = [record["train_loss"] for record in history if "train_loss" in record]
    if not losses:
        raise RuntimeError(
            f"Nothing was trained: in none of the {len(history)} rounds were min_clients={min_clients} clients "
            "available. Use a smaller `min_clients`, more rounds, or look into `availability`."
        )
    return sum(losses) / len(losses)


def run_metrics(history: Sequence[Mapping[str, Any]], min_clients: int) -> dict[str, float]:
    """
    Args:
        history (`Sequence[Mapping[str, Any]]`): All records of a run.
        min_clients (`int`): The number of clients that a round needs, for the error message.

    Returns:
        `dict[str, float]`: The mean training loss over the rounds, and the bytes sent, including those of round 0.

    Raises:
        RuntimeError: if clients trained in no round.
    """
    rounds = [record for record in history if record.get("round")]
    sent = {name: sum(record.get(name, 0) for record in history) for name in ("upload_bytes", "download_bytes")}
    return {"train_loss": mean_train_loss(rounds, min_clients), **sent}
