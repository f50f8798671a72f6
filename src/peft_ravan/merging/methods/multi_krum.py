"""
Multi-Krum: the mean of the clients with the best Krum scores.

Blanchard et al., Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent, NeurIPS 2017.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig

from ..method import MergeMethod
from ..updates import ClientUpdate, MergeResult
from .krum import krum_scores, merge_chosen


def multi_krum(
    global_state: Mapping[str, torch.Tensor],
    updates: Sequence[ClientUpdate],
    config: LoraConfig | None = None,
    num_bad_clients: int | None = None,
    num_chosen: int | None = None,
) -> MergeResult:
    """
    Average the clients that Krum rates best, all with the same weight. For LoRA, their mean product B A is truncated
    to the global rank.

    Args:
        global_state (`Mapping[str, torch.Tensor]`):
            The state the clients started from.
        updates (`Sequence[ClientUpdate]`):
            What the clients uploaded.
        config ([`~peft.LoraConfig`], *optional*):
            The configuration of the global adapter. Needed if LoRA ranks or alphas differ.
        num_bad_clients (`int`, *optional*):
            How many bad clients it shall withstand, f. By default the largest number that 2 f + 3 <= C allows.
        num_chosen (`int`, *optional*):
            How many clients are averaged. By default C - f.

    Returns:
        [`MergeResult`]: The mean state of the chosen clients. The diagnostics contain the `chosen` clients and the
        `scores` of all clients.

    Raises:
        UpdateError: if there are fewer than 2 f + 3 clients.
        ValueError: if `num_chosen` is not between 1 and C.
    """
    if num_chosen is not None and not 1 <= num_chosen <= len(updates):
        raise ValueError(f"multi_krum: `num_chosen` must be from 1 to {len(updates)} clients, got {num_chosen!r}.")
    scores, num_bad_clients = krum_scores(global_state, updates, config, num_bad_clients)
    return merge_chosen(global_state, updates, config, scores, num_chosen or len(updates) - num_bad_clients)


METHOD = MergeMethod(
    name="multi_krum",
    pretty_name="Multi-Krum",
    summary="The clients whose nearest neighbours are nearest are averaged.",
    reference="https://huggingface.co/papers/1703.02757",
    function=multi_krum,
    averages="s*H, or BA, of the chosen clients",
    exact="no",
    cost="layer by layer; C² distances",
    different_ranks=True,
    decomposes=True,
)
