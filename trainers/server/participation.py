"""Which clients take part in a round: availability, sampling weights, and when a round is skipped."""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real

import numpy as np

from ..seeds import derive_seed


Availability = Callable[[str, int], bool]


@dataclass(frozen=True)
class Participation:
    """
    Which clients take part in which round.

    Args:
        clients_per_round (`int`, *optional*): How many clients are sampled for a round. By default all.
        weights (`str` or `dict[str, float]`, *optional*):
            How likely each client is to be sampled: `"examples"` for its number of examples, or a dict of client names
            to weights, also as JSON. By default all are equally likely.
        min_clients (`int`, *optional*, defaults to 1): How many clients must be available for a round.
        min_successful_clients (`int`, *optional*, defaults to 1): How many clients must succeed in a round.
        seed (`int`, *optional*, defaults to 42): The seed of the draws.

    Raises:
        ValueError: if `weights` is neither `"examples"` nor a dict of numbers, 0 or above.
    """

    clients_per_round: int | None = None
    weights: Mapping[str, float] | str | None = None
    min_clients: int = 1
    min_successful_clients: int = 1
    seed: int = 42

    def __post_init__(self):
        object.__setattr__(self, "weights", _read_weights(self.weights))

    def sample(
        self,
        clients: Mapping[str, int],
        round_number: int,
        availability: Availability | None = None,
        attempt: int = 0,
    ) -> list[str]:
        """
        Sample the clients of a round from those that are available, without replacement.

        The sample depends on the seed, the round and the available clients, but not on earlier rounds or the order of
        the clients, so a resumed run samples the same clients as an uninterrupted one. If fewer than `min_clients` are
        available, the round is skipped. A server on the network would wait for more clients, as Flower's server does;
        here more may be available in the next round.

        Args:
            clients (`Mapping[str, int]`): The names of all clients and their numbers of examples.
            round_number (`int`): The round, from 1.
            availability (`Callable[[str, int], bool]`, *optional*): Whether a client is available in a round. By default
                all are.
            attempt (`int`, *optional*, defaults to 0): How many attempts at the round came before.

        Returns:
            `list[str]`: The clients that take part, in the order of `clients`. Empty if too few are available.
        """
        weights = self._weights_of(clients)
        available = [
            client
            for client in sorted(clients)
            if weights[client] > 0 and (availability is None or availability(client, round_number))
        ]
        if len(available) < self.min_clients:
            warnings.warn(
                f"Round {round_number} is skipped: {len(available)} clients are available, and "
                f"min_clients={self.min_clients}."
            )
            return []
        if self.clients_per_round is None or self.clients_per_round >= len(available):
            chosen = set(available)
        else:
            chosen = self._draw(available, weights, round_number, attempt)
        return [client for client in clients if client in chosen]

    def check(self, clients: Mapping[str, int], availability: Availability | None = None) -> None:
        """
        Check that rounds can be sampled from these clients.

        Args:
            clients (`Mapping[str, int]`): The names of all clients and their numbers of examples.
            availability (`Callable[[str, int], bool]`, *optional*): Whether a client is available in a round.

        Raises:
            TypeError: if `availability` is not callable.
            ValueError: if the names in the weights are not those of the clients, or if there can never be enough
                clients.
        """
        if availability is not None and not callable(availability):
            raise TypeError(
                "`availability` must be a function of the client's name and the number of the round, such as "
                f"`lambda client, round: round % 2 == 0`, got {availability!r}."
            )
        if isinstance(self.weights, Mapping):
            _check_names(clients, self.weights)
        drawable = sum(weight > 0 for weight in self._weights_of(clients).values())
        for name in ("min_clients", "clients_per_round", "min_successful_clients"):
            value = getattr(self, name)
            if value is not None and value > drawable:
                of_weight = " with a weight above 0" if self.weights is not None else ""
                raise ValueError(f"`{name}` is {value}, but there are only {drawable} clients{of_weight}. Use fewer.")

    def describe(self, num_clients: int) -> str:
        """
        Args:
            num_clients (`int`): The number of all clients.

        Returns:
            `str`: A description of how many clients take part in a round and how they are sampled.
        """
        number = str(self.clients_per_round or num_clients)
        if self.weights is None:
            return number
        by = "their examples" if self.weights == "examples" else "given weights"
        return f"{number}, drawn by {by}"

    def _draw(self, available: list[str], weights: Mapping[str, float], round_number: int, attempt: int) -> set[str]:
        attempts = (attempt,) if attempt else ()
        seed = derive_seed(self.seed, "participation", round_number, *attempts)
        if self.weights is None:
            return set(random.Random(seed).sample(available, self.clients_per_round))
        # Gumbel's trick: the largest scores are successive draws, each in proportion to the remaining weights
        noise = np.random.default_rng(seed).gumbel(size=len(available))
        scores = np.log([weights[client] for client in available]) + noise
        return {available[index] for index in np.argsort(-scores)[: self.clients_per_round]}

    def _weights_of(self, clients: Mapping[str, int]) -> Mapping[str, float]:
        if self.weights is None:
            return dict.fromkeys(clients, 1.0)
        return clients if self.weights == "examples" else self.weights


def _read_weights(weights: Mapping[str, float] | str | None) -> dict[str, float] | str | None:
    if isinstance(weights, str) and weights.lstrip().startswith("{"):
        weights = json.loads(weights)
    if weights is None or weights == "examples":
        return weights
    if not isinstance(weights, Mapping):
        raise ValueError(
            f"`participation_weights` must be 'examples' or a dict of client name -> weight, got {weights!r}."
        )
    for client, weight in weights.items():
        if not isinstance(weight, Real) or not math.isfinite(weight) or weight < 0:
            raise ValueError(
                f"`participation_weights` must be finite numbers, 0 or above, got {weight!r} for client {client!r}."
            )
    # types that JSON uses, because the arguments are written into checkpoints and logs
    return {str(client): float(weight) for client, weight in weights.items()}


def _check_names(clients: Mapping[str, int], weights: Mapping[str, float]) -> None:
    for what, names in (
        ("leave out", clients.keys() - weights.keys()),
        ("name unknown", weights.keys() - clients.keys()),
    ):
        if names:
            raise ValueError(
                f"`participation_weights` {what} {len(names)} clients, such as {min(names)!r}. Give every client a weight, "
                "which may be 0."
            )
