"""SCAFFOLD's c, the control variate of the server (Karimireddy et al., ICML 2020)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from peft_ravan.merging import UpdateError
from peft_ravan.merging.entries import is_finite


State = Mapping[str, torch.Tensor]


class ControlVariates:
    """
    The control variate of the server during a round. Only clients whose updates are merged move it, so that c stays the
    mean of all c_i.

    Args:
        server (`Mapping[str, torch.Tensor]`): c before the round, by the names of parameters; zeros where there is none.
        num_clients (`int`): The number of all clients.
    """

    def __init__(self, server: State, num_clients: int):
        self.server = dict(server)
        self._num_clients = num_clients
        self._arrived: dict[str, State] = {}
        self._change: dict[str, torch.Tensor] = {}

    def receive(self, client: str, change: State | None) -> None:
        """
        Keep what a client has sent until it is known whether its update is merged.

        Args:
            client (`str`): The name of the client.
            change (`Mapping[str, torch.Tensor]`, *optional*): By how much its c_i has changed.

        Raises:
            UpdateError: if there is no change, or one that cannot be added to c.
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
            # c moves by the mean over the clients of the round times their share of all clients
            share = tensor / self._num_clients
            self._change[name] = self._change[name] + share if name in self._change else share

    def moved(self) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict[str, torch.Tensor]`: c after the round.
        """
        # in an order that does not depend on whether c was saved and read since
        names = sorted({**self.server, **self._change})
        return {name: sum(part[name] for part in (self.server, self._change) if name in part) for name in names}
