"""
Trimmed mean: for every entry, leave out the largest and the smallest values, and average the rest.

Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, ICML 2018, algorithm 1 (option II).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig

from ..coordinatewise import merge_coordinatewise, trimmed_mean_of_entries
from ..method import MergeMethod
from ..updates import ClientUpdate, MergeResult


def trimmed_mean(
    global_state: Mapping[str, torch.Tensor],
    updates: Sequence[ClientUpdate],
    config: LoraConfig | None = None,
    trim: float = 0.1,
) -> MergeResult:
    """
    Take the trimmed mean of every entry of the products s*H, of LoRA's products B A, and of the task head.

    Args:
        global_state (`Mapping[str, torch.Tensor]`):
            The state the clients started from.
        updates (`Sequence[ClientUpdate]`):
            What the clients uploaded.
        config ([`~peft.LoraConfig`], *optional*):
            The configuration of the global adapter. Needed if LoRA ranks or alphas differ.
        trim (`float`, *optional*, defaults to 0.1):
            The share of clients left out at each end, at least 0 and below 0.5: the largest share of bad clients that
            it withstands. The number of clients is rounded up.

    Returns:
        [`MergeResult`]: The new state. For LoRA, the diagnostics contain `kept_energy`, see [`merge_coordinatewise`].

    Raises:
        ValueError: if `trim` is out of range.
    """
    if not 0 <= trim < 0.5:
        raise ValueError(f"trimmed_mean: `trim` must be at least 0 and below 0.5, got {trim!r}.")

    def combine(values: torch.Tensor) -> torch.Tensor:
        num_clients = values.shape[-1]
        # the small term is for products such as 0.1 * 30, which are slightly above 3
        num_trimmed = math.ceil(trim * num_clients - 1e-9)
        return trimmed_mean_of_entries(values, min(num_trimmed, (num_clients - 1) // 2))

    return merge_coordinatewise(global_state, updates, combine, config)


METHOD = MergeMethod(
    name="trimmed_mean",
    pretty_name="Trimmed Mean",
    summary="Of every entry of the weight update the extremes are left out, and the rest is averaged.",
    reference="https://huggingface.co/papers/1803.01498",
    function=trimmed_mean,
    averages="every entry of s*H, or of BA, without its extremes",
    exact="no",
    cost="layer by layer; for LoRA C·d_out·d_in operations",
    different_ranks=True,
    different_heads=True,
    decomposes=True,
)
