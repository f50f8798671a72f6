"""From the update of a weight back to LoRA's A and B of a given rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig

from ..linalg import svd_of_product
from .averaging import client_weights, mean_state
from .lora import LoraTarget, is_lora_matrix, keep_trainable, product_targets, stacked_factors
from .updates import ClientUpdate


def truncated_factors(
    target: LoraTarget, left: torch.Tensor, right: torch.Tensor | None, like: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], float]:
    """
    The best approximation of `left @ right` by B A of the global rank: B = U S and A = V^T of the singular value
    decomposition, sorted by singular value. The rows of A have norm 1, which is the size LoRA starts them with.

    Args:
        target ([`LoraTarget`]): The module.
        left (`torch.Tensor`): `[d_out, k]`, or the whole product.
        right (`torch.Tensor`): `[k, d_in]`, or `None`.
        like (`Mapping[str, torch.Tensor]`): The global state, whose rank, dtypes and devices are taken.

    Returns:
        `tuple[dict[str, torch.Tensor], float]`: A and B by their names, and the share of the squared norm they hold.
    """
    global_B, global_A = target.factors(like)
    U, S, Vh, kept = svd_of_product(left, right, rank=len(global_A))
    B, A = torch.zeros_like(global_B), torch.zeros_like(global_A)
    B[:, : len(S)], A[: len(S)] = U * S, Vh
    return target.as_state(*keep_trainable(B, A, global_B, global_A), like), kept


def aligned_factors(
    target: LoraTarget, state: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """
    Other factors of the same product, with an A as near to the global one as the product allows. A decomposition chooses
    its factors anew in every round, so their difference from the global ones is no update of the weight.

    Args:
        target ([`LoraTarget`]): The module.
        state (`Mapping[str, torch.Tensor]`): The state with the product.
        like (`Mapping[str, torch.Tensor]`): The global state, of the same rank.

    Returns:
        `dict[str, torch.Tensor]`: A and B by their names.
    """
    B, A = (factor.double() for factor in target.factors(state))
    global_A = target.factors(like)[1].double()
    _, S, Vh, _ = svd_of_product(B, A, rank=len(A))
    rows = Vh[S > 1e-6 * S.max()]  # [q, d_in], orthonormal: what every A of this product must span
    rest = global_A - (global_A @ rows.T) @ rows
    others = torch.linalg.svd(rest, full_matrices=False).Vh[: len(A) - len(rows)]
    spanned = torch.cat([rows, others])  # [r, d_in]
    new_A = (global_A @ spanned.T) @ spanned
    return target.as_state(B @ (A @ torch.linalg.pinv(new_A)), new_A, like)


def mean_of_products(
    global_state: Mapping[str, torch.Tensor], updates: Sequence[ClientUpdate], config: LoraConfig | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """
    Average the products B A of LoRA, cut to the global rank, and all other tensors as they are.

    Args:
        global_state (`Mapping[str, torch.Tensor]`): The state the clients started from.
        updates (`Sequence[ClientUpdate]`): What the clients uploaded.
        config ([`~peft.LoraConfig`], *optional*): The configuration of the global adapter.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, float]]`: The mean state, and for each adapted module the share of the
        squared norm of its mean product that was kept.
    """
    weights = client_weights(updates)
    lora_names = tuple(name for name in global_state if is_lora_matrix(name))
    state, kept_energy = mean_state(global_state, updates, leave_out=lora_names), {}
    for target in product_targets(global_state, config):
        stacked = stacked_factors(target, updates, weights, global_state, config)
        matrices, kept_energy[target.module] = truncated_factors(target, *stacked, like=global_state)
        state.update(matrices)
    return state, kept_energy
