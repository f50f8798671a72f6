"""
The server's part of round 0, which averages sketches of the clients' gradients to make common bases.

Some clients first warm up the task head, because the gradients of a head with random weights carry little information.
Starting from the mean of these heads, each client uploads a sketch of its mean gradient. The bases are made from the
mean of the sketches. Both means are plain weighted means, so they would also work with secure aggregation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from peft_ravan.merging import UpdateLimits, merge

from ..exchange import ClientReply, ClientTask
from ..seeds import derive_seed
from .inbox import Inbox
from .merging import merge_of
from .participation import Participation
from .rounds import Round, RoundFailedError
from .settings import ServerSettings


State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class BasesSettings:
    """
    How common bases are made from gradients.

    Args:
        clients (`int`, *optional*): How many clients take part. By default as many as in other rounds.
        warmup_steps (`int`, *optional*, defaults to 10): For how many steps each of them first trains the task head.
        batches (`int`, *optional*, defaults to 8): Over how many batches each of them averages its gradient.
        rank (`int`, *optional*, defaults to 32): How many directions of the mean gradient to keep at each target, at most
            `h*r`.

    Raises:
        ValueError: if one of them is below 1, or `warmup_steps` below 0.
    """

    clients: int | None = None
    warmup_steps: int = 10
    batches: int = 8
    rank: int = 32

    def __post_init__(self):
        for name in ("clients", "batches", "rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`bases_{name}` must be 1 or more, got {value!r}.")
        if self.warmup_steps < 0:
            raise ValueError(f"`bases_warmup_steps` must be 0 or more, got {self.warmup_steps!r}.")


def sample_bases_clients(
    sizes: Mapping[str, int], participation: Participation, bases_clients: int | None
) -> list[str]:
    """
    Sample the clients of round 0.

    Args:
        sizes (`Mapping[str, int]`): The names of all clients and their numbers of examples.
        participation ([`Participation`]): Which clients take part in other rounds.
        bases_clients (`int`, *optional*): How many take part. By default as many as in other rounds.

    Returns:
        `list[str]`: The names of the clients, drawn with the weights of other rounds but with a seed of its own.
    """
    of_bases = replace(
        participation,
        clients_per_round=bases_clients or participation.clients_per_round,
        seed=derive_seed(participation.seed, "bases"),
    )
    return of_bases.sample(sizes, 0)


class RoundZero:
    """
    The round that makes common bases. It has one or two exchanges, each of which is opened and closed like a round.

    Args:
        settings ([`ServerSettings`]): How rounds are run.
        bases ([`BasesSettings`]): How the bases are made.

    **Attributes**:
        - **this_round** ([`Round`]) -- The round in progress.
    """

    def __init__(self, settings: ServerSettings, bases: BasesSettings):
        self.settings, self.bases = settings, bases
        clients = sample_bases_clients(settings.client_sizes, settings.participation, bases.clients)
        self.this_round = Round(0, clients)
        self._tasks: dict[str, ClientTask] = {}

    def open(self, purpose: str, state: State) -> list[ClientTask]:
        """
        Args:
            purpose (`str`): `"warm_up"` or `"sketch"`.
            state (`Mapping[str, torch.Tensor]`): What the clients start from: the task head.

        Returns:
            `list[ClientTask]`: One task per client. Clients that failed are not asked again.
        """
        this_round, seed = self.this_round, self.settings.seed
        this_round.clients = [client for client in this_round.clients if client not in this_round.failures]
        if purpose == "warm_up":
            asked: dict[str, Any] = {"max_steps": self.bases.warmup_steps}
        else:
            asked = {"max_steps": self.bases.batches, "rank": self.bases.rank}
        exchange = self.settings.exchange
        sent, asked["upload_dtype"] = exchange.sent(state), exchange.change_dtype
        # not the learning rate of the first round, which is 0 if the schedule starts with a warm-up
        self._tasks = {
            client: ClientTask(
                0, client, sent, derive_seed(seed, "client", 0, client), purpose, self.settings.run, **asked
            )
            for client in this_round.clients
        }
        this_round.download_bytes += sum(task.num_bytes for task in self._tasks.values())
        return list(self._tasks.values())

    def close(self, like: State, replies: Iterable[ClientReply]) -> dict[str, torch.Tensor]:
        """
        Args:
            like (`Mapping[str, torch.Tensor]`): The names, shapes and dtypes that updates must have, and the values that
                changes are added to: the task head, or zeros for sketches.
            replies (`Iterable[ClientReply]`): The replies.

        Returns:
            `dict[str, torch.Tensor]`: The mean of the updates.

        Raises:
            RoundFailedError: if too few clients succeeded.
        """
        this_round, inbox = self.this_round, Inbox(self.this_round, self._tasks, like)
        updates = (inbox.update_of(reply, self.settings) for reply in inbox.taken(replies))
        result = merge_of(
            this_round, lambda: merge(like, updates, "fedavg", on_bad_update="drop", limits=self._limits())
        )
        inbox.miss_the_others()
        needed = min(self.settings.participation.min_successful_clients, len(this_round.clients))
        if len(this_round.num_examples) < max(1, needed):
            raise RoundFailedError(
                f"Round 0, which makes the bases: fewer than {needed} clients (`min_successful_clients`) succeeded. "
                f"{this_round.failed()} Let more clients take part (`bases_clients`), or make the bases before with "
                "`initialize_bases_from_gradient`."
            ) from this_round.first_error
        return result.state

    def sent_to_all(self, state: State) -> None:
        """
        Count the bytes that are sent to all clients at the end.

        Args:
            state (`Mapping[str, torch.Tensor]`): The bases.
        """
        sizes = self.settings.client_sizes
        self.this_round.download_bytes += ClientTask(0, "", state, 0).num_bytes * len(sizes)

    def record(self) -> dict[str, Any]:
        """
        Returns:
            `dict[str, Any]`: The record of round 0 for the history.
        """
        return self.this_round.record()

    def _limits(self) -> UpdateLimits:
        limits = self.settings.merging.limits
        # an absolute limit is meant for changes of the adapter, not for gradients; a multiple of the median suits both
        return limits if limits.needs_all_updates else replace(limits, max_update_norm=None)
