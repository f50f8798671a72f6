"""
Ravan's exact average: each head's product s*H is averaged over the clients that trained the head.

Raje et al., Ravan: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning, NeurIPS 2025, section 4. Since the bases are
common and frozen, the mean of the products is the mean of the clients' weight updates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..state import is_core
from .averaging import client_weights, weighted_mean
from .updates import ClientUpdate, MergeResult


def trained_on_head(
    name: str, head: int, num_heads: int, updates: Sequence[ClientUpdate]
) -> tuple[list[ClientUpdate], list[torch.Tensor]]:
    """
    Find who trained a head.

    Args:
        name (`str`): A checkpoint name that ends in `ravan_H`.
        head (`int`): The index of the head.
        num_heads (`int`): The number of heads, h.
        updates (`Sequence[ClientUpdate]`): What the clients uploaded.

    Returns:
        `tuple[list[ClientUpdate], list[torch.Tensor]]`: The updates of the clients that trained it, and the products
        `[r, r]` that they uploaded for it.
    """
    trainers, products = [], []
    for update in updates:
        mask = update.heads(name, num_heads)
        if mask[head]:
            trainers.append(update)
            # the upload has only the trained heads, in order: the position is the number of trained heads before this
            products.append(update.state[name][int(mask[:head].sum())])
    return trainers, products


def ravan(global_state: Mapping[str, torch.Tensor], updates: Sequence[ClientUpdate]) -> MergeResult:
    """
    Average each head over the clients that trained it, and all other tensors over all clients.

    Args:
        global_state (`Mapping[str, torch.Tensor]`): The state the clients started from.
        updates (`Sequence[ClientUpdate]`): What the clients uploaded.

    Returns:
        [`MergeResult`]: The mean state. A head that nobody trained keeps its value. The diagnostics have, for each
        core, the number of clients that trained each head (`clients_per_head`).
    """
    weights = client_weights(updates)
    state, clients_per_head = {}, {}
    for name, tensor in global_state.items():
        if not is_core(name):
            state[name] = weighted_mean([update.state[name] for update in updates], weights, like=tensor)
            continue
        heads, counts = [], []
        for head in range(tensor.shape[0]):
            trainers, products = trained_on_head(name, head, tensor.shape[0], updates)
            counts.append(len(trainers))
            heads.append(
                weighted_mean(products, client_weights(trainers), like=tensor) if trainers else tensor[head].clone()
            )
        state[name] = torch.stack(heads)
        clients_per_head[name] = counts
    return MergeResult(state, {"clients_per_head": clients_per_head})
