"""
TIES: trim each client's update to its largest entries, elect a sign for every entry, and average those that agree.

Yadav et al., TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023. As in PEFT, an update is trimmed
matrix by matrix, not over the whole adapter, and a tie elects the plus sign.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ..matrices import merge_matrices
from ..method import MergeMethod
from ..updates import ClientUpdate, MergeResult


def ties(
    global_state: Mapping[str, torch.Tensor],
    updates: Sequence[ClientUpdate],
    density: float = 0.2,
    scale: float = 1.0,
) -> MergeResult:
    """
    Trim, elect signs, and average the entries that agree.

    Args:
        global_state (`Mapping[str, torch.Tensor]`):
            The state the clients started from.
        updates (`Sequence[ClientUpdate]`):
            What the clients uploaded.
        density (`float`, *optional*, defaults to 0.2):
            The share of entries of each matrix that a client keeps, the largest ones.
        scale (`float`, *optional*, defaults to 1.0):
            The factor of the merged update (lambda in the paper).

    Returns:
        [`MergeResult`]: The new state. The task head and biases are averaged.

    Raises:
        ValueError: if `density` is not above 0 and at most 1, or `scale` is not a finite number.
    """
    if not 0 < density <= 1:
        raise ValueError(f"ties: `density` must be above 0 and at most 1, got {density!r}.")
    if not math.isfinite(scale):
        raise ValueError(f"ties: `scale` must be a finite number, got {scale!r}.")

    def combine(M: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        kept = torch.topk(M.abs(), max(1, round(density * len(M))), dim=0).indices
        trimmed = torch.zeros_like(M).scatter_(0, kept, M.gather(0, kept))  # [n, C]
        # in units of the smallest weight, so that rounding does not break ties between equal weights or their
        # multiples
        votes = trimmed @ (weights / weights.min())  # [n]
        # plus on a tie, as in PEFT
        agreeing = torch.where(votes[:, None] >= 0, trimmed > 0, trimmed < 0)  # [n, C]
        total = agreeing.to(M) @ weights
        return scale * ((trimmed * agreeing) @ weights) / torch.where(total > 0, total, 1.0)

    return MergeResult(merge_matrices(global_state, updates, combine))


METHOD = MergeMethod(
    name="ties",
    pretty_name="TIES",
    summary="Updates are trimmed to their largest entries, and only entries of the elected sign are averaged.",
    reference="https://huggingface.co/papers/2306.01708",
    function=ties,
    averages="the largest entries of the elected sign, of cores, or of A and B, apart",
    exact="no",
    cost="layer by layer",
    different_heads=True,
    from_start=True,
)
