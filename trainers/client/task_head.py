"""The learning rate of a new task head, which is usually larger than that of the adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer


_PART = ".modules_to_save."


def set_task_head_rate(optimizer: torch.optim.Optimizer, model: nn.Module, learning_rate: float) -> None:
    """
    Give the trained copies of `modules_to_save` a learning rate of their own, in groups at the end of the optimizer's
    groups. Everything else of their groups stays, such as the weight decay.

    Args:
        optimizer (`torch.optim.Optimizer`): An optimizer that has not taken a step.
        model ([`~peft.PeftModel`]): The model that it trains.
        learning_rate (`float`): The learning rate of the task head.
    """
    of_head = {id(parameter) for name, parameter in model.named_parameters() if _PART in name}
    new_groups = []
    for group in optimizer.param_groups:
        options = {name: value for name, value in group.items() if name != "params"}
        parameters = [parameter for parameter in group["params"] if id(parameter) in of_head]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in of_head]
        if parameters:
            new_groups.append({**options, "params": parameters, "lr": learning_rate})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    for group in new_groups:
        optimizer.add_param_group(group)


def check_task_head_rate(trainer: Trainer, learning_rate: float | None) -> None:
    """
    Args:
        trainer ([`~transformers.Trainer`]): The trainer of the clients.
        learning_rate (`float`, *optional*): The learning rate of the task head.

    Raises:
        ValueError: if the model has no task head to train, or the optimizer has parameter groups already.
    """
    if learning_rate is None:
        return
    if not any(_PART in name and parameter.requires_grad for name, parameter in trainer.model.named_parameters()):
        raise ValueError(
            f"`task_head_learning_rate={learning_rate!r}` is given, but the adapter trains no task head. Name it in "
            "`modules_to_save` of its configuration, or give no such rate."
        )
    kwargs: dict[str, Any] = (trainer.optimizer_cls_and_kwargs or (None, {}))[1]
    if "params" in kwargs:
        raise ValueError(
            f"`task_head_learning_rate={learning_rate!r}` is given, but so are parameter groups in "
            "`optimizer_cls_and_kwargs`. Use one of both."
        )
