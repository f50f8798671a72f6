"""A run of a federation on one machine: its server, its clients and its identity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .client.local_client import LocalClient
from .run_folder import RunIdentity
from .server.mean_of_rounds import mean_of_rounds
from .server.server import Server


@dataclass
class Run:
    """
    A run of a federation between two rounds.

    Args:
        server ([`Server`]): The server.
        client ([`LocalClient`]): The clients, which take turns.
        facts (`Mapping[str, Any]`): The setup of the run, see [`run_facts`]. Empty if the run saves no checkpoints.
        identity ([`RunIdentity`]): What distinguishes it from other runs in its folder.
    """

    server: Server
    client: LocalClient
    facts: Mapping[str, Any] = field(default_factory=dict)
    identity: RunIdentity = field(default_factory=RunIdentity)

    @property
    def round(self) -> int:
        """The last round that was run."""
        return self.server.state.round

    def state(self) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict[str, torch.Tensor]`: The global adapter. Its personal parts have their initial values.
        """
        return {**self.server.state.global_state, **self.client.personal_start}

    def load_global(self) -> None:
        """Load the global adapter into the model."""
        self.client.adapter.load(self.state())

    def load_result(self) -> None:
        """Load the result of the run so far into the model: the global adapter, or the mean over the last rounds."""
        self.client.adapter.load({**mean_of_rounds(self.server.state), **self.client.personal_start})

    def take_global(self) -> None:
        """Use the adapter in the model as the global one."""
        self.server.state = replace(
            self.server.state, global_state=self.client.take_start(), earlier=(), running_mean={}
        )
