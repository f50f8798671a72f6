"""
Fed-SB: one head between bases from the gradient, averaged exactly.

Singhal et al., Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated LoRA
Fine-Tuning, 2025. The adapter is LoRA-SB, which is Ravan with one head and `init_bases="gradient_svd"`: the
clients train and upload the r x r matrix R (here H) and nothing else. The mean of R is the mean of the clients' weight
updates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ...tuner.state import is_core
from ..averaging import mean_state
from ..method import MergeMethod
from ..updates import ClientUpdate, MergeResult


def fed_sb(global_state: Mapping[str, torch.Tensor], updates: Iterable[ClientUpdate]) -> MergeResult:
    """
    Average the one core of every target.

    Args:
        global_state (`Mapping[str, torch.Tensor]`): The state the clients started from.
        updates (`Iterable[ClientUpdate]`): What the clients uploaded.

    Returns:
        [`MergeResult`]: The mean state.

    Raises:
        ValueError: if there are no cores, or some have more than one head.
    """
    heads = {name: len(tensor) for name, tensor in global_state.items() if is_core(name)}
    other = next((name for name, num_heads in heads.items() if num_heads != 1), None)
    if not heads or other is not None:
        found = f"tensor {other!r} has {heads[other]} heads" if heads else "there are no cores (`ravan_H`)"
        raise ValueError(
            f"Fed-SB merges Ravan adapters with one head, but {found}. Use "
            "`RavanConfig(num_heads=1, init_bases=\"gradient_svd\")`, or method='ravan' for more heads."
        )
    return MergeResult(mean_state(global_state, updates))


METHOD = MergeMethod(
    name="fed_sb",
    pretty_name="Fed-SB",
    summary="The one core between bases from the gradient is averaged, which is exact.",
    reference="https://huggingface.co/papers/2502.15436",
    function=fed_sb,
    averages="s*H of the one head",
    exact="yes",
    cost="one pass",
    secure_aggregation=True,
    plain_mean=True,
    streaming=True,
)
