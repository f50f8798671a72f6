"""
FedRot-LoRA: each client's factors are rotated onto the global ones before A and B are averaged separately.

Zhang et al., FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA, 2026. B_c R_c^T and R_c A_c have the
same product for every rotation R_c, so clients that agree may upload factors that cancel out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig

from ..averaging import client_weights, mean_state, weighted_mean
from ..lora import is_lora_matrix, product_targets
from ..method import MergeMethod
from ..truncation import nearest_orthonormal
from ..updates import ClientUpdate, MergeResult


def fedrot_lora(
    global_state: Mapping[str, torch.Tensor], updates: Sequence[ClientUpdate], config: LoraConfig | None = None
) -> MergeResult:
    """
    Rotate each client's A and B and average them separately. Average all other tensors as they are.

    Args:
        global_state (`Mapping[str, torch.Tensor]`):
            The state the clients started from. Its A and B are the targets of the rotations.
        updates (`Sequence[ClientUpdate]`):
            What the clients uploaded.
        config ([`~peft.LoraConfig`], *optional*):
            The configuration of the adapter.

    Returns:
        [`MergeResult`]: The mean state of the rotated factors.

    Raises:
        ValueError: if there are no LoRA matrices, or the adapter adds something other than their products to the
            weights.
    """
    targets = product_targets(global_state, config, required="FedRot-LoRA")
    weights = client_weights(updates).tolist()
    lora_names = tuple(name for name in global_state if is_lora_matrix(name))
    state = mean_state(global_state, updates, leave_out=lora_names)
    for target in targets:
        B, A = target.factors(global_state)
        factors = [rotated_onto(B, A, *target.factors(update.state)) for update in updates]
        mean_B = weighted_mean((b for b, _ in factors), weights, like=B)
        mean_A = weighted_mean((a for _, a in factors), weights, like=A)
        state.update(target.as_state(mean_B, mean_A, like=global_state))
    return MergeResult(state)


def rotated_onto(
    global_B: torch.Tensor, global_A: torch.Tensor, B: torch.Tensor, A: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The factors with the same product that are jointly nearest to the global ones (orthogonal Procrustes).

    Args:
        global_B (`torch.Tensor`): `[d_out, r]`.
        global_A (`torch.Tensor`): `[r, d_in]`.
        B (`torch.Tensor`): `[d_out, r]`.
        A (`torch.Tensor`): `[r, d_in]`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: B R^T and R A in float64, with the orthogonal R that minimises
        `||R A - global_A||^2 + ||B R^T - global_B||^2`.
    """
    global_B, global_A, B, A = (factor.double() for factor in (global_B, global_A, B, A))
    rotation = nearest_orthonormal(global_A @ A.T + global_B.T @ B)  # [r, r]
    return B @ rotation.T, rotation @ A


METHOD = MergeMethod(
    name="fedrot_lora",
    pretty_name="FedRot-LoRA",
    summary="LoRA's A and B are rotated onto the global ones, which keeps their product, and averaged apart.",
    reference="https://huggingface.co/papers/2602.23638",
    function=fedrot_lora,
    averages="A and B, rotated onto the global ones, apart",
    exact="no",
    cost="layer by layer; a decomposition of r x r for each client",
    from_start=True,
)
