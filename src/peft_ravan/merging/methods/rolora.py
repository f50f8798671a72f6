"""
RoLoRA: A and B take turns being trained and averaged, which is exact.

Chen et al., Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA, 2025. While one of A and B is
frozen and the same for all clients, averaging the other one averages the products.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..averaging import mean_state
from ..lora import FRAME_PARTS, ZERO_PARTS, require_lora
from ..method import MergeMethod
from ..updates import ClientUpdate, MergeResult


def rolora(
    global_state: Mapping[str, torch.Tensor], updates: Iterable[ClientUpdate], round_number: int = 1
) -> MergeResult:
    """
    Average the one of A and B that is trained in this round, and all other tensors, over all clients.

    Args:
        global_state (`Mapping[str, torch.Tensor]`):
            The state the clients started from.
        updates (`Iterable[ClientUpdate]`):
            What the clients uploaded. They may leave out what is frozen in the round. A frozen tensor that differs
            from the global one is refused.
        round_number (`int`, *optional*, defaults to 1):
            The round. B, which LoRA starts at zero, is trained in odd rounds, and A in even rounds. For an embedding,
            A and B are swapped.

    Returns:
        [`MergeResult`]: The mean state. What was frozen is unchanged.

    Raises:
        ValueError: if there are no LoRA matrices, or they belong to DoRA or AdaLoRA.
    """
    require_lora(global_state, ZERO_PARTS, "RoLoRA")
    return MergeResult(mean_state(global_state, updates, leave_out=METHOD.frozen_in(round_number)))


METHOD = MergeMethod(
    name="rolora",
    pretty_name="RoLoRA",
    summary="LoRA's A and B are trained and averaged in turns, which is exact.",
    reference="https://huggingface.co/papers/2502.01755",
    function=rolora,
    averages="B in odd rounds, A in even ones",
    exact="yes",
    cost="one pass",
    secure_aggregation=True,
    plain_mean=True,
    streaming=True,
    frozen_cycle=(FRAME_PARTS, ZERO_PARTS),
)
