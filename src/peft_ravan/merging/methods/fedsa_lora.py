"""
FedSA-LoRA: A is shared and averaged, B stays with its client.

Guo et al., Selective Aggregation for Low-Rank Adaptation in Federated Learning, ICLR 2025. A learns what the clients
have in common, B what is specific to a client.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..averaging import mean_state
from ..lora import A_PARTS, B_PARTS, require_lora
from ..method import MergeMethod
from ..updates import ClientUpdate, MergeResult


def fedsa_lora(global_state: Mapping[str, torch.Tensor], updates: Iterable[ClientUpdate]) -> MergeResult:
    """
    Average A, and all other tensors except B, over all clients.

    Args:
        global_state (`Mapping[str, torch.Tensor]`):
            The state the clients started from.
        updates (`Iterable[ClientUpdate]`):
            What the clients uploaded. An upload with a B is refused, since B is personal.

    Returns:
        [`MergeResult`]: The mean state, with the global B, from which new clients start.

    Raises:
        ValueError: if there are no LoRA matrices.
    """
    require_lora(global_state, A_PARTS, "FedSA-LoRA")
    return MergeResult(mean_state(global_state, updates, leave_out=B_PARTS))


METHOD = MergeMethod(
    name="fedsa_lora",
    pretty_name="FedSA-LoRA",
    summary="LoRA's A is averaged, and B stays with its client.",
    reference="https://huggingface.co/papers/2410.01463",
    function=fedsa_lora,
    averages="A (B is personal)",
    exact="for a client with its own B: no",
    cost="one pass",
    secure_aggregation=True,
    plain_mean=True,
    streaming=True,
    personal_parts=B_PARTS,
)
