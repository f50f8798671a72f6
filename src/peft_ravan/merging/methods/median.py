"""
Median: every entry of the update becomes its median over the clients.

Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, ICML 2018, algorithm 1 (option I).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig

from ..coordinatewise import merge_coordinatewise, trimmed_mean_of_entries
from ..method import MergeMethod
from ..updates import ClientUpdate, MergeResult


def median(
    global_state: Mapping[str, torch.Tensor], updates: Sequence[ClientUpdate], config: LoraConfig | None = None
) -> MergeResult:
    """
    Take the median of every entry of the products s*H, of LoRA's products B A, and of the task head. It stays within
    the range of the honest clients' uploads as long as they are the majority.

    Args:
        global_state (`Mapping[str, torch.Tensor]`):
            The state the clients started from.
        updates (`Sequence[ClientUpdate]`):
            What the clients uploaded.
        config ([`~peft.LoraConfig`], *optional*):
            The configuration of the global adapter. Needed if LoRA ranks or alphas differ.

    Returns:
        [`MergeResult`]: The new state. For LoRA, the diagnostics contain `kept_energy`, see [`merge_coordinatewise`].
    """
    return merge_coordinatewise(
        global_state, updates, lambda values: trimmed_mean_of_entries(values, (values.shape[-1] - 1) // 2), config
    )


METHOD = MergeMethod(
    name="median",
    pretty_name="Median",
    summary="Every entry of the weight update becomes its median over the clients.",
    reference="https://huggingface.co/papers/1803.01498",
    function=median,
    averages="the median of every entry of s*H, or of BA",
    exact="no",
    cost="layer by layer; for LoRA C·d_out·d_in operations",
    different_ranks=True,
    different_heads=True,
    decomposes=True,
)
