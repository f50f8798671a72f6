"""
LoRA-FAIR: A and B are averaged separately, and B is corrected to bring the product nearest to the mean of the
products.

Bian et al., LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement, ICCV 2025. The paper
measures the distance by cosine similarity and finds the correction by gradient steps. Here the distance is the squared
error, for which the correction is known in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig

from ...tuner.linalg import pseudo_inverse, squared_norm_of_product
from ..averaging import client_weights, mean_state
from ..lora import is_lora_matrix, product_targets
from ..method import MergeMethod
from ..updates import ClientUpdate, MergeResult


def lora_fair(
    global_state: Mapping[str, torch.Tensor],
    updates: Sequence[ClientUpdate],
    config: LoraConfig | None = None,
    lambda_: float = 0.01,
) -> MergeResult:
    """
    Average A and B separately, and all other tensors, and correct B.

    Args:
        global_state (`Mapping[str, torch.Tensor]`):
            The state the clients started from.
        updates (`Sequence[ClientUpdate]`):
            What the clients uploaded.
        config ([`~peft.LoraConfig`], *optional*):
            The configuration of the adapter.
        lambda_ (`float`, *optional*, defaults to 0.01):
            The weight of the squared norm of the correction, against the squared distance of the products. 0 is the
            nearest product that the mean of A allows.

    Returns:
        [`MergeResult`]: The mean state, with corrected B (for an embedding, corrected A). The diagnostics contain
        `remaining_error`: for each module, the share of the distance to the mean of the products that is left.

    Raises:
        ValueError: if there are no LoRA matrices, if the adapter adds something other than their products to the
            weights, or if `lambda_` is negative or not finite.
    """
    targets = product_targets(global_state, config, required="LoRA-FAIR")
    if not (lambda_ >= 0 and math.isfinite(lambda_)):
        raise ValueError(f"lora_fair: `lambda_` must be a finite number, 0 or more, got {lambda_!r}.")
    weights = client_weights(updates)
    lora_names = tuple(name for name in global_state if is_lora_matrix(name))
    state, remaining_error = mean_state(global_state, updates, leave_out=lora_names), {}
    for target in targets:
        pairs = [target.swapped(*target.factors(update.state)) for update in updates]
        others, frames = (
            torch.stack(factors).double() for factors in zip(*pairs, strict=True)
        )  # [C, d, r], [C, r, d']
        shares = weights.to(others)
        other, frame = torch.einsum("c,cij->ij", shares, others), torch.einsum("c,cij->ij", shares, frames)
        # the error of the means, written as the mean of (B_c - mean B)(A_c - mean A) to avoid subtracting large
        # numbers
        left = torch.cat([*(shares[:, None, None] * (others - other))], dim=1)  # [d, C*r]
        right = torch.cat([*(frames - frame)])  # [C*r, d']
        damped = frame @ frame.T + lambda_ * torch.eye(len(frame)).to(frame)
        correction = left @ (right @ frame.T) @ pseudo_inverse(damped)
        missing = squared_norm_of_product(left, right)
        left_over = squared_norm_of_product(torch.cat([left, -correction], dim=1), torch.cat([right, frame]))
        remaining_error[target.module] = math.sqrt(left_over / missing) if missing else 0.0
        state.update(target.as_state(*target.swapped(other + correction, frame), like=global_state))
    return MergeResult(state, {"remaining_error": remaining_error})


METHOD = MergeMethod(
    name="lora_fair",
    pretty_name="LoRA-FAIR",
    summary="LoRA's A and B are averaged apart, and B is corrected towards the mean of the products BA.",
    reference="https://huggingface.co/papers/2411.14961",
    function=lora_fair,
    averages="A and B, apart; B is corrected towards mean(BA)",
    exact="up to what A allows",
    cost="layer by layer; products with C·r x C·r matrices",
)
