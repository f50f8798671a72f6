"""
FedSVD: clients train B only, and the server makes A anew in every round from the singular vectors of the mean.

Lee et al., FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA, 2025. A is frozen during a round,
so that the mean of B is exact. Its rows become orthonormal and follow the main directions of the update, within the space
that they span from the start.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from peft import LoraConfig

from ..averaging import mean_state
from ..lora import FRAME_PARTS, product_targets
from ..method import MergeMethod
from ..truncation import truncated_factors
from ..updates import ClientUpdate, MergeResult


def fedsvd(
    global_state: Mapping[str, torch.Tensor], updates: Iterable[ClientUpdate], config: LoraConfig | None = None
) -> MergeResult:
    """
    Average B, and all other tensors but A, and write the product B A in factors of which A has orthonormal rows.

    Args:
        global_state (`Mapping[str, torch.Tensor]`):
            The state the clients started from.
        updates (`Iterable[ClientUpdate]`):
            What the clients uploaded. They may leave out A; an A that differs from the global one is refused. On an
            embedding A and B change places.
        config ([`~peft.LoraConfig`], *optional*):
            The configuration of the adapter.

    Returns:
        [`MergeResult`]: The new state: of the decomposition U S V^T of mean(B) A, B is U S and A is V^T. Every client needs
        both for the next round.

    Raises:
        ValueError: if there are no LoRA matrices, or their products are not what the adapter adds to the weights.
    """
    targets = product_targets(global_state, config, required="FedSVD")
    state = mean_state(global_state, updates, leave_out=FRAME_PARTS)
    for target in targets:
        matrices, _ = truncated_factors(target, *target.factors(state), like=global_state)
        state.update(matrices)
    return MergeResult(state)


METHOD = MergeMethod(
    name="fedsvd",
    pretty_name="FedSVD",
    summary="LoRA's B is trained and averaged, which is exact, and A is made anew from the singular vectors of BA.",
    reference="https://huggingface.co/papers/2505.12805",
    function=fedsvd,
    averages="B (A is frozen for a round)",
    exact="yes",
    cost="one pass; a decomposition of rank r",
    secure_aggregation=True,
    streaming=True,
    decomposes=True,
    frozen_cycle=(FRAME_PARTS,),
)
