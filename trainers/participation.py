"""Who takes part in a round: who is available, how likely each is drawn, and when a round is skipped."""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Callable, Mapping
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np

from .rounds import derive_seed


if TYPE_CHECKING:
    from .arguments import FederatedArguments


Availability = Callable[[str, int], bool]


def sample_clients(
    clients: Mapping[str, int],
    args: FederatedArguments,
    round_number: int,
    availability: Availability | None = None,
    attempt: int = 0,
) -> list[str]:
    """
    Draw the clients of a round from those that are available, without replacement.

    The draw depends on the seed, the round and who is available, not on earlier rounds or the order of the clients, so a
    resumed run draws what an uninterrupted one would. With fewer than `min_clients` available the round is skipped. A
    server on the network would wait for more, as Flower's does; here they may come with the next round.

    Args:
        clients (`Mapping[str, int]`): The names of all clients, and how many examples each has.
        args ([`FederatedArguments`]):
            The arguments, of which `clients_per_round`, `participation_weights`, `min_clients` and `federated_seed` are
            read.
        round_number (`int`): The round, from 1.
        availability (`Callable[[str, int], bool]`, *optional*): Whether a client is available in a round. By default
            all are.
        attempt (`int`, *optional*, defaults to 0): How often the round was tried before.

    Returns:
        `list[str]`: The clients that take part, in the order of `clients`. None, if too few are available.
    """
    weights = _weights(clients, args)
    available = [
        client
        for client in sorted(clients)
        if weights[client] > 0 and (availability is None or availability(client, round_number))
    ]
    if len(available) < args.min_clients:
        warnings.warn(
            f"Round {round_number} is skipped: {len(available)} clients are available, and min_clients={args.min_clients}."
        )
        return []
    if args.clients_per_round is None or args.clients_per_round >= len(available):
        chosen = set(available)
    else:
        chosen = _draw(available, weights, args, round_number, attempt)
    return [client for client in clients if client in chosen]


def _draw(
    available: list[str], weights: Mapping[str, float], args: FederatedArguments, round_number: int, attempt: int
) -> set[str]:
    attempts = (attempt,) if attempt else ()
    seed = derive_seed(args.federated_seed, "participation", round_number, *attempts)
    if args.participation_weights is None:
        return set(random.Random(seed).sample(available, args.clients_per_round))
    # Gumbel's trick: the largest scores are a draw, one after another, each in proportion to the weights of those left
    noise = np.random.default_rng(seed).gumbel(size=len(available))
    scores = np.log([weights[client] for client in available]) + noise
    return {available[index] for index in np.argsort(-scores)[: args.clients_per_round]}


def _weights(clients: Mapping[str, int], args: FederatedArguments) -> Mapping[str, float]:
    if args.participation_weights is None:
        return dict.fromkeys(clients, 1.0)
    return clients if args.participation_weights == "examples" else args.participation_weights


def check_participation_arguments(args: FederatedArguments) -> None:
    """
    Check what can be checked without the clients, and read `participation_weights` if they are JSON.

    Args:
        args ([`FederatedArguments`]): The arguments.

    Raises:
        ValueError: if `participation_weights` are neither `"examples"` nor a number for each client, 0 or above.
    """
    weights = args.participation_weights
    if isinstance(weights, str) and weights.lstrip().startswith("{"):
        weights = json.loads(weights)
    if weights is None or weights == "examples":
        return
    if not isinstance(weights, Mapping):
        raise ValueError(
            f"`participation_weights` must be 'examples' or a dict of client name -> weight, got {weights!r}."
        )
    for client, weight in weights.items():
        if not isinstance(weight, Real) or not math.isfinite(weight) or weight < 0:
            raise ValueError(
                f"`participation_weights` must be finite numbers, 0 or above, got {weight!r} for client {client!r}."
            )
    # as JSON has them: the arguments are written into checkpoints and logs
    args.participation_weights = {str(client): float(weight) for client, weight in weights.items()}


def check_participation(
    clients: Mapping[str, int], args: FederatedArguments, availability: Availability | None = None
) -> None:
    """
    Check that rounds can be drawn from the clients that there are.

    Args:
        clients (`Mapping[str, int]`): The names of all clients, and how many examples each has.
        args ([`FederatedArguments`]): The arguments, as for [`sample_clients`].
        availability (`Callable[[str, int], bool]`, *optional*): Whether a client is available in a round.

    Raises:
        TypeError: if `availability` cannot be called.
        ValueError: if `participation_weights` do not name the clients, or there are never enough clients.
    """
    if availability is not None and not callable(availability):
        raise TypeError(
            "`availability` must be a function of the client's name and the number of the round, such as "
            f"`lambda client, round: round % 2 == 0`, got {availability!r}."
        )
    if isinstance(args.participation_weights, Mapping):
        _check_names(clients, args.participation_weights)
    drawable = sum(weight > 0 for weight in _weights(clients, args).values())
    for name in ("min_clients", "clients_per_round", "min_successful_clients"):
        value = getattr(args, name)
        if value is not None and value > drawable:
            of_weight = " with a weight above 0" if args.participation_weights is not None else ""
            raise ValueError(f"`{name}` is {value}, but there are only {drawable} clients{of_weight}. Use fewer.")


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


def describe_participation(args: FederatedArguments, num_clients: int) -> str:
    """
    Args:
        args ([`FederatedArguments`]): The arguments.
        num_clients (`int`): The number of all clients.

    Returns:
        `str`: How many clients take part in a round and how they are drawn, in words.
    """
    number = str(args.clients_per_round or num_clients)
    if args.participation_weights is None:
        return number
    by = "their examples" if args.participation_weights == "examples" else "given weights"
    return f"{number}, drawn by {by}"
