"""
Ravan's exact average: each head's product s*H is averaged over the clients that trained the head.

Raje et al., Ravan: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning, NeurIPS 2025. Since all clients share the
frozen bases, the mean of the products is the mean of the clients' weight updates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..averaging import StateMean
from ..method import MergeMethod
from ..updates import ClientUpdate, MergeResult


def ravan(global_state: Mapping[str, torch.Tensor], updates: Iterable[ClientUpdate]) -> MergeResult:
    """
    Average each head over the clients that trained it, and all other tensors over all clients.

    Args:
        global_state (`Mapping[str, torch.Tensor]`): The state the clients started from.
        updates (`Iterable[ClientUpdate]`): What the clients uploaded.

    Returns:
        [`MergeResult`]: The mean state. A head that nobody trained keeps its value. The diagnostics contain
        `clients_per_head`: for each core, the number of clients that trained each head.
    """
    mean = StateMean(global_state)
    for update in updates:
        mean.add(update)
    return MergeResult(mean.state(), {"clients_per_head": mean.clients_per_head})


METHOD = MergeMethod(
    name="ravan",
    pretty_name="Ravan",
    summary="Each head's product s*H is averaged over the clients that trained it, which is exact.",
    reference="https://huggingface.co/papers/2506.05568",
    function=ravan,
    averages="s*H of each head over the clients that trained it",
    exact="yes",
    cost="one pass",
    secure_aggregation=True,
    plain_mean=True,
    different_heads=True,
    streaming=True,
)
