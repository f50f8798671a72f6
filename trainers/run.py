"""A run of a federation on one machine: its server, its clients and its identity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .client.batching import ClientBatch
from .client.local_client import LocalClient
from .exchange import ClientReply, ClientTask
from .original_base import OriginalBase
from .run_folder import RunIdentity
from .runners import Runner
from .server.mean_of_rounds import mean_of_rounds
from .server.server import Server


@dataclass
class Run:
    """
    A run of a federation between two rounds.

    Args:
        server ([`Server`]): The server.
        client ([`LocalClient`]): The clients, which take turns.
        base ([`OriginalBase`], *optional*): The base weights that it started from, if its merge method changes them.
        batch ([`ClientBatch`], *optional*): Trains several clients at once. By default they train one after the other.
        facts (`Mapping[str, Any]`): The setup of the run, see [`run_facts`]. Empty if the run saves no checkpoints.
        identity ([`RunIdentity`]): What distinguishes it from other runs in its folder.
    """

    server: Server
    client: LocalClient
    base: OriginalBase | None = None
    batch: ClientBatch | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    identity: RunIdentity = field(default_factory=RunIdentity)

    @property
    def round(self) -> int:
        """The last round that was run."""
        return self.server.state.round

    def replies(self, runner: Runner, tasks: Sequence[ClientTask]) -> Iterator[ClientReply]:
        """
        Let clients train.

        Args:
            runner ([`Runner`]): The runner.
            tasks (`Sequence[ClientTask]`): Their tasks.

        Returns:
            `Iterator[ClientReply]`: Their replies.
        """
        if self.batch is None:
            return runner.run(tasks, self.client.train)
        return runner.run(self.batch.divided(tasks), self.batch.train)

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
        result = mean_of_rounds(self.server.state, self.server.settings.merging.averaged_form)
        self.client.adapter.load({**result, **self.client.personal_start})

    def take_global(self) -> None:
        """Use the adapter in the model as the global one."""
        self.server.state = replace(
            self.server.state, global_state=self.client.take_start(), earlier=(), running_mean={}
        )

    def load_saved(self, checkpoint: Mapping[str, torch.Tensor]) -> None:
        """
        Load a saved adapter into the model.

        Args:
            checkpoint (`Mapping[str, torch.Tensor]`): The tensors of `adapter_model.safetensors`.
        """
        adapter = self.client.adapter
        adapter.load_checkpoint(checkpoint if self.base is None else self.base.in_rounds(checkpoint, adapter))

    def on_original_base(self) -> AbstractContextManager[None]:
        """
        Returns:
            `AbstractContextManager`: A context in which the model has its original base weights, and an adapter for them.
        """
        return nullcontext() if self.base is None else self.base.restored(self.client.adapter)

    def finish(self) -> None:
        """Leave the result in the model, on its original base weights."""
        self.batch = None  # with its copies of the adapter
        self.load_result()
        if self.base is not None:
            self.base.restore(self.client.adapter)
            self.base.warn_if_large()
