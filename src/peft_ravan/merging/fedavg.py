"""
FedAvg: every tensor becomes its mean over the clients, weighted by their examples.

McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017, algorithm 1.
On LoRA's A and B, each on its own, this is FedIT (Zhang et al., 2023), which is not the mean of the products B A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..state import is_core
from .averaging import client_weights, weighted_mean
from .updates import ClientUpdate, MergeResult, UpdateError


def fedavg(global_state: Mapping[str, torch.Tensor], updates: Sequence[ClientUpdate]) -> MergeResult:
    """
    Average every tensor over all clients.

    Args:
        global_state (`Mapping[str, torch.Tensor]`): The state the clients started from.
        updates (`Sequence[ClientUpdate]`): What the clients uploaded.

    Returns:
        [`MergeResult`]: The mean state.

    Raises:
        UpdateError: if a client trained only some of the heads.
    """
    for update in updates:
        for name, tensor in global_state.items():
            if is_core(name) and not update.heads(name, tensor.shape[0]).all():
                raise UpdateError(
                    f"client {update.client_id!r}, tensor {name!r}: only some heads were trained, but 'fedavg' averages "
                    "whole tensors. Use method='ravan', which averages each head over the clients that trained it."
                )
    weights = client_weights(updates)
    state = {
        name: weighted_mean([update.state[name] for update in updates], weights, like=tensor)
        for name, tensor in global_state.items()
    }
    return MergeResult(state)
