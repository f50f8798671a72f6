"""SCAFFOLD's c, the control variate of the server (Karimireddy et al., ICML 2020)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from peft_ravan.merging import UpdateError
from peft_ravan.merging.entries import is_finite


State = Mapping[str, torch.Tensor]


class ControlVariates:
    """
    The control variate of the server during a round. Only clients whose updates are merged change it, so c stays the
    mean of all c_i.

    Args:
        server (`Mapping[str, torch.Tensor]`): c before the round, by parameter names. Missing entries count as zeros.
        num_clients (`int`): The number of all clients.
    """

    def __init__(self, server: State, num_clients: int):
        self.server = dict(server)
        self._num_clients = num_clients
        self._arrived: dict[str, State] = {}
        self._change: dict[str, torch.Tensor] = {}

    def receive(self, client: str, change: State | None) -> None:
        """
        Hold the change of a client until it is known whether its update is merged.

        Args:
            client (`str`): The name of the client.
            change (`Mapping[str, torch.Tensor]`, *optional*): The change of its c_i.

        Raises:
            UpdateError: if the change is missing, or cannot be added to c.
        """
        if change is None:
            raise UpdateError(f"client {client!r}: it has sent no change of its control variate.")
        for name, tensor in change.items():
            others = [control[name].shape for control in (self.server, self._change) if name in control]
            fits = tensor.is_floating_point() and all(shape == tensor.shape for shape in others)
            if not fits or not is_finite(tensor):
                raise UpdateError(
                    f"client {client!r}: the change of its control variate for {name!r} has another shape or dtype than that "
                    "of the others, or entries that are NaN or infinite."
                )
        self._arrived[client] = change

    def add(self, client: str) -> None:
        """
        Args:
            client (`str`): A client whose update is merged.
        """
        for name, tensor in self._arrived.pop(client).items():
            # c changes by the mean over the clients of the round, times their share of all clients
            share = tensor / self._num_clients
            self._change[name] = self._change[name] + share if name in self._change else share

    def moved(self) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict[str, torch.Tensor]`: c after the round.
        """
        # sorted, so that the order is the same after c was saved and loaded
        names = sorted({**self.server, **self._change})
        return {name: sum(part[name] for part in (self.server, self._change) if name in part) for name in names}
