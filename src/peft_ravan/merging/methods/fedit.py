"""
FedIT: LoRA's A and B are averaged separately.

Zhang et al., Towards Building the Federated GPT: Federated Instruction Tuning, ICASSP 2024. The product of the means
is not the mean of the products. FedEx-LoRA adds the difference to the base weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..averaging import mean_state
from ..lora import A_PARTS, require_lora
from ..method import MergeMethod
from ..updates import ClientUpdate, MergeResult


def fedit(global_state: Mapping[str, torch.Tensor], updates: Iterable[ClientUpdate]) -> MergeResult:
    """
    Average A and B separately, and all other tensors, over all clients.

    Args:
        global_state (`Mapping[str, torch.Tensor]`): The state the clients started from.
        updates (`Iterable[ClientUpdate]`): What the clients uploaded.

    Returns:
        [`MergeResult`]: The mean state.

    Raises:
        ValueError: if there are no LoRA matrices.
    """
    require_lora(global_state, A_PARTS, "FedIT")
    return MergeResult(mean_state(global_state, updates))


METHOD = MergeMethod(
    name="fedit",
    pretty_name="FedIT",
    summary="LoRA's A and B are averaged apart, weighted by examples.",
    reference="https://huggingface.co/papers/2305.05644",
    function=fedit,
    averages="A and B, apart",
    exact="no",
    cost="one pass",
    secure_aggregation=True,
    plain_mean=True,
    streaming=True,
)
