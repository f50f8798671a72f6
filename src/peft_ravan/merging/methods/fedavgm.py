"""
FedAvgM: momentum on the server.

Hsu et al., Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification, 2019,
section 4.2.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..method import ServerOptimizer
from ..server_optimizers import State, check_options, step_by_tensor


def fedavgm(
    global_state: Mapping[str, torch.Tensor],
    merged_state: Mapping[str, torch.Tensor],
    server_state: Mapping[str, torch.Tensor],
    learning_rate: float = 1.0,
    momentum: float = 0.9,
) -> tuple[State, State]:
    """
    Take a step with momentum: `v <- momentum * v + difference`, `state <- state + learning_rate * v`.

    Args:
        global_state (`Mapping[str, torch.Tensor]`):
            The state the clients started from.
        merged_state (`Mapping[str, torch.Tensor]`):
            The state merged from their updates.
        server_state (`Mapping[str, torch.Tensor]`):
            What the last step returned.
        learning_rate (`float`, *optional*, defaults to 1.0):
            The learning rate of the server.
        momentum (`float`, *optional*, defaults to 0.9):
            The decay of the momentum. With 0 and a learning rate of 1 the merged state is the new state.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]`: The new state and the new server state.

    Raises:
        ValueError: if an option is out of range.
    """
    check_options("fedavgm", learning_rate, momentum)

    def step(difference: torch.Tensor, velocity: torch.Tensor) -> tuple[torch.Tensor, ...]:
        velocity = momentum * velocity + difference
        return learning_rate * velocity, velocity

    return step_by_tensor(global_state, merged_state, server_state, {"fedavgm.velocity": 0.0}, step)


OPTIMIZER = ServerOptimizer(
    name="fedavgm",
    pretty_name="FedAvgM",
    summary="Momentum on the server.",
    reference="https://huggingface.co/papers/1909.06335",
    function=fedavgm,
)
