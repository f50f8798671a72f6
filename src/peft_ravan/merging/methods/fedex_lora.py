"""
FedEx-LoRA: A and B are averaged separately, and the resulting error is added to the base weight. This makes the merge
exact.

Singhal et al., FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language Models, ACL
2025. The residual mean(B_c A_c) - mean(B) mean(A) is computed as mean((B_c - mean B)(A_c - mean A)), which is equal
but does not subtract large numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig

from ..averaging import client_weights, mean_state
from ..base_deltas import BaseDelta
from ..lora import lora_scaling, product_targets
from ..method import MergeMethod
from ..updates import ClientUpdate, MergeResult


def fedex_lora(
    global_state: Mapping[str, torch.Tensor], updates: Sequence[ClientUpdate], config: LoraConfig | None = None
) -> MergeResult:
    """
    Average A and B separately, and return what has to be added to the base weights.

    Args:
        global_state (`Mapping[str, torch.Tensor]`): The state the clients started from.
        updates (`Sequence[ClientUpdate]`): What the clients uploaded.
        config ([`~peft.LoraConfig`]): The configuration of the adapter. Its alpha / r is part of the residual.

    Returns:
        [`MergeResult`]: The mean state. `base_deltas` contains the residual of each module, including the scaling. Add
        it with [`add_base_deltas`], which is exact in float32 and can carry over what rounding to half precision
        loses. The residual is stored as factors of rank C * r (plus r in half precision), or as the whole matrix if
        that is smaller.

    Raises:
        ValueError: if there are no LoRA matrices, or no `config`.
    """
    targets = product_targets(global_state, config, required="FedEx-LoRA")
    if config is None:
        raise ValueError(
            "FedEx-LoRA needs `config`, the LoraConfig of the adapter: what is added to the base weight has its alpha / r."
        )
    weights = client_weights(updates).tolist()
    state, base_deltas = mean_state(global_state, updates), {}
    for target in targets:
        mean_B, mean_A = target.factors(state)
        factors = [target.factors(update.state) for update in updates]
        scaling = lora_scaling(config, target.module, target.rank(global_state))
        rights = [A - mean_A for _, A in factors]
        if state[target.B_name].dtype.itemsize < 4:
            # in half precision the means are rounded, and the residual has to include the rounding error
            lefts = [weight * B for (B, _), weight in zip(factors, weights, strict=True)]
            lefts, rights = [*lefts, sum(lefts) - mean_B], [*rights, mean_A]
        else:
            lefts = [weight * (B - mean_B) for (B, _), weight in zip(factors, weights, strict=True)]
        base_deltas[target.module] = BaseDelta.from_factors(scaling * torch.cat(lefts, dim=1), torch.cat(rights))
    return MergeResult(state, base_deltas=base_deltas)


METHOD = MergeMethod(
    name="fedex_lora",
    pretty_name="FedEx-LoRA",
    summary="LoRA's A and B are averaged apart, and the residual of their product is added to the base weight.",
    reference="https://huggingface.co/papers/2410.09432",
    function=fedex_lora,
    averages="A and B, apart; the rest of mean(BA) goes to the base weight",
    exact="yes",
    cost="layer by layer; a residual of rank C·r",
    changes_model=True,
)
