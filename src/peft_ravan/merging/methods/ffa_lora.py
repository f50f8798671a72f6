"""
FFA-LoRA: A is frozen at its common random start, and B is averaged, which is exact.

Sun et al., Improving LoRA in Privacy-preserving Federated Learning, ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..averaging import mean_state
from ..lora import A_PARTS, B_PARTS, require_lora
from ..method import MergeMethod
from ..updates import ClientUpdate, MergeResult


def ffa_lora(global_state: Mapping[str, torch.Tensor], updates: Iterable[ClientUpdate]) -> MergeResult:
    """
    Average B, and all other tensors except A, over all clients.

    Args:
        global_state (`Mapping[str, torch.Tensor]`):
            The state the clients started from.
        updates (`Iterable[ClientUpdate]`):
            What the clients uploaded. They may leave out A. An A that differs from the global one is refused, since B
            only makes sense with the common A.

    Returns:
        [`MergeResult`]: The mean state, with the global A.

    Raises:
        ValueError: if there are no LoRA matrices.
    """
    require_lora(global_state, B_PARTS, "FFA-LoRA")
    return MergeResult(mean_state(global_state, updates, leave_out=A_PARTS))


METHOD = MergeMethod(
    name="ffa_lora",
    pretty_name="FFA-LoRA",
    summary="LoRA's A is frozen and B is averaged, which is exact.",
    reference="https://huggingface.co/papers/2403.12313",
    function=ffa_lora,
    averages="B (A is frozen)",
    exact="yes",
    cost="one pass",
    secure_aggregation=True,
    plain_mean=True,
    streaming=True,
    frozen_parts=A_PARTS,
)
