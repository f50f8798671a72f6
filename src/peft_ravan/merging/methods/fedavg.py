"""
FedAvg: every tensor becomes its mean over the clients, weighted by their examples.

McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..averaging import mean_state
from ..method import MergeMethod
from ..updates import ClientUpdate, MergeResult


def fedavg(global_state: Mapping[str, torch.Tensor], updates: Iterable[ClientUpdate]) -> MergeResult:
    """
    Average every tensor over all clients.

    Args:
        global_state (`Mapping[str, torch.Tensor]`): The state the clients started from.
        updates (`Iterable[ClientUpdate]`): What the clients uploaded.

    Returns:
        [`MergeResult`]: The mean state.
    """
    return MergeResult(mean_state(global_state, updates))


METHOD = MergeMethod(
    name="fedavg",
    pretty_name="FedAvg",
    summary="Every tensor is averaged over the clients, weighted by their examples.",
    reference="https://huggingface.co/papers/1602.05629",
    function=fedavg,
    averages="every tensor",
    exact="Ravan: yes, LoRA: no",
    cost="one pass",
    secure_aggregation=True,
    plain_mean=True,
    streaming=True,
)
