"""Choosing the size of an adapter by the parameter count of LoRA, and parameter groups for the optimizer."""

from __future__ import annotations

import copy
import re
from collections import Counter
from typing import Any

from torch import nn

from .config import RavanConfig
from .model import RavanModel


def ravan_config_for_budget(
    model: nn.Module,
    lora_rank: int = 8,
    num_heads: int = 4,
    target_modules: list[str] | str | None = None,
    **kwargs,
) -> RavanConfig:
    """
    Choose `r` such that the adapter trains as many parameters as LoRA of a given rank on the same targets, or slightly
    fewer.

    Args:
        model (`torch.nn.Module`):
            The base model.
        lora_rank (`int`, *optional*, defaults to 8):
            The rank of LoRA.
        num_heads (`int`, *optional*, defaults to 4):
            The number of heads.
        target_modules (`list[str]` or `str`, *optional*):
            The targets, as in the configuration.
        **kwargs:
            The other fields of the configuration.

    Returns:
        [`RavanConfig`]: The configuration, with `rank_pattern` where targets differ in size.

    Raises:
        ValueError: if the budget of a target is too small for a head of rank 1, or if there are no targets.

    Example:

        ```py
        >>> from peft_ravan import ravan_config_for_budget

        >>> config = ravan_config_for_budget(base_model, lora_rank=8, num_heads=4, task_type="SEQ_CLS")
        ```
    """
    config = RavanConfig(num_heads=num_heads, target_modules=target_modules, **kwargs)
    ranks = _ranks_for_budget(model, config, lora_rank)
    config.r, _ = Counter(ranks.values()).most_common(1)[0]
    config.rank_pattern = {re.escape(name): r for name, r in ranks.items() if r != config.r}
    return config


def _ranks_for_budget(model: nn.Module, config: RavanConfig, lora_rank: int) -> dict[str, int]:
    """
    The largest rank of a head at each target with which Ravan trains at most as many parameters as LoRA of a given
    rank. LoRA trains `lora_rank * (d_in + d_out)` parameters, Ravan `num_heads * (r**2 + 1)`, or
    `num_heads * r**2` without trained scalings.
    """
    ranks = {}
    for name, (d_in, d_out) in RavanModel.target_sizes(model, copy.deepcopy(config)).items():
        num_heads = config.size_of(name)[1]
        budget = lora_rank * (d_in + d_out)
        ranks[name] = int(max(0, budget / num_heads - config.parameters_per_head(0)) ** 0.5)
        if ranks[name] < 1:
            raise ValueError(
                f"The target {name!r} ({d_in} x {d_out}) has a budget of {budget} parameters at lora_rank={lora_rank}, "
                f"which is too little for num_heads={num_heads}. Use fewer heads."
            )
    if not ranks:
        raise ValueError(f"The model has none of the target modules {config.target_modules}.")
    return ranks


def optimizer_parameter_groups(
    model: nn.Module,
    learning_rate: float,
    core_learning_rate: float | None = None,
    scaling_learning_rate: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """
    Parameter groups for an optimizer: cores, scalings and all other trained parameters, with separate learning rates.
    Scalings and biases have no weight decay.

    Args:
        model (`torch.nn.Module`):
            The model with its adapter.
        learning_rate (`float`):
            The learning rate of all parameters that are not part of Ravan, such as the classification head.
        core_learning_rate (`float`, *optional*):
            The learning rate of the cores H, by default `learning_rate`.
        scaling_learning_rate (`float`, *optional*):
            The learning rate of the scalings s, by default the one of the cores.
        weight_decay (`float`, *optional*, defaults to 0.0):
            The weight decay of cores and of weights.

    Returns:
        `list[dict[str, Any]]`: The groups that are not empty, each with its `name`.

    Example:

        ```py
        >>> groups = optimizer_parameter_groups(model, learning_rate=1e-2, core_learning_rate=1e-3)
        >>> trainer = Trainer(model, args, optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": groups, "lr": 1e-2}))
        ```
    """
    core_learning_rate = learning_rate if core_learning_rate is None else core_learning_rate
    scaling_learning_rate = core_learning_rate if scaling_learning_rate is None else scaling_learning_rate
    groups = {
        "cores": {"params": [], "lr": core_learning_rate, "weight_decay": weight_decay},
        "scalings": {"params": [], "lr": scaling_learning_rate, "weight_decay": 0.0},
        "weights": {"params": [], "lr": learning_rate, "weight_decay": weight_decay},
        "biases": {"params": [], "lr": learning_rate, "weight_decay": 0.0},
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if ".ravan_H." in name:
            group = "cores"
        elif ".ravan_s." in name:
            group = "scalings"
        else:
            group = "weights" if parameter.dim() > 1 else "biases"
        groups[group]["params"].append(parameter)
    return [{"name": name, **group} for name, group in groups.items() if group["params"]]
