"""Checks whether a federation can be private with its clients and its adapter."""

from __future__ import annotations

from collections.abc import Sequence

from .participation import Participation
from .privacy import Privacy, PrivateRounds, import_dp_accounting


def check_privacy_of_adapter(awaits_gradient: bool, statistics: Sequence[str]) -> None:
    """
    Args:
        awaits_gradient (`bool`): Whether the bases of the adapter still have to be made from gradients.
        statistics (`Sequence[str]`): The names of running statistics in the updates of clients.

    Raises:
        ValueError: if the updates of clients cannot be private.
    """
    if awaits_gradient:
        raise ValueError(
            "`privacy` does not go with bases that are made from the clients' gradients in a round 0, which has neither "
            "clipping nor noise. Make them from public data before (`initialize_bases_from_gradient`), or use other bases."
        )
    if statistics:
        raise ValueError(
            f"`privacy` does not go with running statistics that clients upload, such as {statistics[0]!r}: noise "
            "could make a variance negative. Use a normalisation without them, such as LayerNorm or GroupNorm."
        )


def private_rounds(
    privacy: Privacy, participation: Participation, num_clients: int, num_rounds: int, always_available: bool = True
) -> PrivateRounds:
    """
    Calibrate the noise of a federation.

    Args:
        privacy ([`Privacy`]): What is asked for.
        participation ([`Participation`]): Which clients take part in which round.
        num_clients (`int`): The number of all clients.
        num_rounds (`int`): The number of rounds.
        always_available (`bool`, *optional*, defaults to `True`): Whether all clients can be drawn in all rounds.

    Returns:
        [`PrivateRounds`]: The noise and the accounting.

    Raises:
        ImportError: if dp-accounting is not installed.
        ValueError: if the federation cannot provide the privacy that is asked for.
    """
    import_dp_accounting()
    if privacy.secret_sampling and not always_available:
        raise ValueError(
            "`secret_sampling` counts on clients that are drawn from all with equal chances, but `availability` decides who "
            "can be drawn. Leave one of the two out."
        )
    return PrivateRounds(privacy, num_clients, participation.clients_per_round or num_clients, num_rounds)
