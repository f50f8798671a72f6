"""
Task arithmetic: the mean of the clients' updates, times a factor.

Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023. In the paper, tasks are merged by summing their task
vectors and multiplying by a factor. Here the mean replaces the sum, so that a factor of 1 is FedAvg.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from ..averaging import mean_state
from ..matrices import is_adapter_matrix
from ..method import MergeMethod
from ..updates import ClientUpdate, MergeResult


def task_arithmetic(
    global_state: Mapping[str, torch.Tensor], updates: Iterable[ClientUpdate], scale: float = 1.0
) -> MergeResult:
    """
    Move the global state by the mean update times a factor.

    Args:
        global_state (`Mapping[str, torch.Tensor]`): The state the clients started from.
        updates (`Iterable[ClientUpdate]`): What the clients uploaded.
        scale (`float`, *optional*, defaults to 1.0): The factor of the mean update of the adapter's matrices.

    Returns:
        [`MergeResult`]: The new state. The task head and biases are averaged.

    Raises:
        ValueError: if `scale` is not a finite number.
    """
    if not math.isfinite(scale):
        raise ValueError(f"task_arithmetic: `scale` must be a finite number, got {scale!r}.")
    state = mean_state(global_state, updates)
    for name in filter(is_adapter_matrix, state):
        # start + scale * (mean - start), written so that a factor of 1 is FedAvg bit for bit
        state[name] += (scale - 1) * (state[name] - global_state[name])
    return MergeResult(state)


METHOD = MergeMethod(
    name="task_arithmetic",
    pretty_name="Task Arithmetic",
    summary="The mean update is multiplied by one factor.",
    reference="https://huggingface.co/papers/2212.04089",
    function=task_arithmetic,
    averages="the updates of cores, or of A and B, apart, times a factor",
    exact="no",
    cost="one pass",
    secure_aggregation=True,
    different_heads=True,
    streaming=True,
    from_start=True,
)
