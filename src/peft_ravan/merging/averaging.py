"""Means weighted by the number of examples, which every method builds on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .updates import ClientUpdate


def client_weights(updates: Sequence[ClientUpdate]) -> torch.Tensor:
    """
    Args:
        updates (`Sequence[ClientUpdate]`): The updates of C clients.

    Returns:
        `torch.Tensor`: Each client's share of the examples, `[C]` in float64, with sum 1.
    """
    num_examples = torch.tensor([update.num_examples for update in updates], dtype=torch.float64)
    return num_examples / num_examples.sum()


def weighted_mean(tensors: Sequence[torch.Tensor], weights: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """
    Args:
        tensors (`Sequence[torch.Tensor]`): C tensors of one shape.
        weights (`torch.Tensor`): Their weights, `[C]`, with sum 1.
        like (`torch.Tensor`): The tensor whose dtype and device the mean gets.

    Returns:
        `torch.Tensor`: The mean, summed in at least float32.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    total = torch.zeros(tensors[0].shape, dtype=dtype, device=like.device)
    for tensor, weight in zip(tensors, weights.tolist(), strict=True):
        total.add_(tensor.to(device=like.device, dtype=dtype), alpha=weight)
    return total.to(like.dtype)
