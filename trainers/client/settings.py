"""What a client is told before its first task."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClientSettings:
    """
    How a client trains, beside what its trainer does by itself.

    Args:
        personal_patterns (`tuple[str, ...]`, *optional*):
            Regular expressions for the checkpoint names of what stays with the client. By default nothing does.
        frozen_parts (`tuple[str, ...]`, *optional*):
            Parts of the names of parameters that nobody ever trains, such as LoRA's A for FFA-LoRA. By default none.
        proximal_mu (`float`, *optional*, defaults to 0.0): FedProx: how strongly it is pulled back to the global adapter.
        timeout (`float`, *optional*): The seconds after which its training is given up. By default never.
        attributes (`tuple[str, ...]`, *optional*):
            Names of attributes of the trainer that change while a client trains, such as running sums of metrics. They are
            as before afterwards.
    """

    personal_patterns: tuple[str, ...] = ()
    frozen_parts: tuple[str, ...] = ()
    proximal_mu: float = 0.0
    timeout: float | None = None
    attributes: tuple[str, ...] = ("_metrics", "_total_train_tokens")
