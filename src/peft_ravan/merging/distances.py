"""Distances between what clients uploaded, in the weights they would change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig

from .lora import LoraTarget, client_factors, is_lora_matrix, lora_scaling, product_targets
from .matrices import split
from .updates import ClientUpdate


def squared_distances(
    global_state: Mapping[str, torch.Tensor], updates: Sequence[ClientUpdate], config: LoraConfig | None = None
) -> torch.Tensor:
    """
    The squared Euclidean distances between the clients' updates: of the products s*H, of LoRA's products B A and of all
    other tensors. The products of LoRA are never formed.

    Args:
        global_state (`Mapping[str, torch.Tensor]`):
            The state the clients started from.
        updates (`Sequence[ClientUpdate]`):
            What C clients uploaded, with all heads.
        config ([`~peft.LoraConfig`], *optional*):
            The configuration of the global adapter, whose alpha / r then multiplies the products.

    Returns:
        `torch.Tensor`: `[C, C]` in float64.
    """
    targets = product_targets(global_state, config)
    gram = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for target in targets:
        scaling = 1.0 if config is None else lora_scaling(config, target.module, target.rank(global_state))
        gram += scaling**2 * _gram_of_products(target, global_state, updates, config)
    for name, tensor in global_state.items():
        if not is_lora_matrix(name):
            for matrix in split(name, tensor, updates):
                M = matrix.columns().double()
                gram += (M.T @ M).cpu()
    squared_norms = gram.diagonal()
    return (squared_norms[:, None] + squared_norms - 2 * gram).clamp_(min=0).fill_diagonal_(0)


def _gram_of_products(
    target: LoraTarget,
    global_state: Mapping[str, torch.Tensor],
    updates: Sequence[ClientUpdate],
    config: LoraConfig | None,
) -> torch.Tensor:
    """The inner products of B_c A_c - B A, where B and A are the global ones, `[C, C]`."""
    global_B, global_A = target.factors(global_state)
    lefts, rights, owners = [], [], []
    for index, update in enumerate(updates):
        B, A = client_factors(target, update, global_state, config)
        lefts.append(torch.cat([B, -global_B.to(B)], dim=1).double())  # [d_out, r_c + r]
        rights.append(torch.cat([A, global_A.to(A)]).double())  # [r_c + r, d_in]
        owners += [index] * len(rights[-1])
    all_left, all_right, owners = torch.cat(lefts, dim=1), torch.cat(rights), torch.tensor(owners)
    gram = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for index, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        # <L_i R_i, L_j R_j> is the sum over all entries of (L_i^T L_j) * (R_i R_j^T)
        columns = ((left.T @ all_left) * (right @ all_right.T)).sum(dim=0).cpu()
        gram[index].index_add_(0, owners, columns)
    return gram
