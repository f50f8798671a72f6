"""
FedSVD: clients train only B, and in every round the server recomputes A from the singular vectors of the mean.

Lee et al., FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA, 2025. A is frozen during a
round, so the mean of B is exact. The rows of A become orthonormal and follow the main directions of the update, within
the space that they span at the start.
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
    Average B, and all other tensors except A, and refactor the product B A such that A has orthonormal rows.

    Args:
        global_state (`Mapping[str, torch.Tensor]`):
            The state the clients started from.
        updates (`Iterable[ClientUpdate]`):
            What the clients uploaded. They may leave out A; an A that differs from the global one is refused. For an
            embedding, A and B are swapped.
        config ([`~peft.LoraConfig`], *optional*):
            The configuration of the adapter.

    Returns:
        [`MergeResult`]: The new state: B = U S and A = V^T, where U S V^T is the decomposition of mean(B) A. Every
        client needs both for the next round.

    Raises:
        ValueError: if there are no LoRA matrices, or the adapter adds something other than their products to the
            weights.
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
