"""
FedYogi: Yogi on the server.

Reddi et al., Adaptive Federated Optimization, ICLR 2021, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..method import ServerOptimizer
from ..server_optimizers import State, check_options, step_with_two_moments


def fedyogi(
    global_state: Mapping[str, torch.Tensor],
    merged_state: Mapping[str, torch.Tensor],
    server_state: Mapping[str, torch.Tensor],
    learning_rate: float = 0.01,
    beta_1: float = 0.9,
    beta_2: float = 0.99,
    tau: float = 1e-3,
) -> tuple[State, State]:
    """
    Take a step of Yogi: `m <- beta_1 * m + (1 - beta_1) * difference`, `v <- v - (1 - beta_2) * difference^2 * sign(v
    - difference^2)`, `state <- state + learning_rate * m / (sqrt(v) + tau)`. As in the paper, there is no bias
    correction, and v starts at tau^2.

    Args:
        global_state (`Mapping[str, torch.Tensor]`):
            The state the clients started from.
        merged_state (`Mapping[str, torch.Tensor]`):
            The state merged from their updates.
        server_state (`Mapping[str, torch.Tensor]`):
            What the last step returned.
        learning_rate (`float`, *optional*, defaults to 0.01):
            The learning rate of the server: about the step of an entry in a round.
        beta_1 (`float`, *optional*, defaults to 0.9):
            The decay of the first moment.
        beta_2 (`float`, *optional*, defaults to 0.99):
            The decay of the second moment.
        tau (`float`, *optional*, defaults to 1e-3):
            The adaptivity: the smaller, the more every entry moves by the same step.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]`: The new state and the new server state.

    Raises:
        ValueError: if an option is out of range.
    """
    check_options("fedyogi", learning_rate, beta_1, beta_2, tau=tau)

    def second_moment(variance: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        return variance - (1 - beta_2) * square * (variance - square).sign()

    return step_with_two_moments(
        global_state,
        merged_state,
        server_state,
        "fedyogi",
        second_moment,
        learning_rate=learning_rate,
        beta_1=beta_1,
        tau=tau,
    )


OPTIMIZER = ServerOptimizer(
    name="fedyogi",
    pretty_name="FedYogi",
    summary="Yogi on the server.",
    reference="https://huggingface.co/papers/2003.00295",
    function=fedyogi,
)
