"""What secure aggregation needs of an adapter and of the budgets of its clients."""

from __future__ import annotations

from collections.abc import Mapping

from peft import PeftModel
from transformers import TrainingArguments
from transformers.utils import logging

from ..client.live_adapter import LiveAdapter


logger = logging.get_logger(__name__)

# heads that one client alone trains are reported if they are more than so many of all heads
MAX_SHARE_OF_SINGLE_HEADS = 0.01


def check_model(model: PeftModel, args: TrainingArguments, send_bases: bool) -> None:
    """
    Check that the clients of a federation with `secure_aggregation` upload only what can be summed.

    Args:
        model ([`~peft.PeftModel`]): The model of the server.
        args ([`FederatedArguments`]): The arguments.
        send_bases (`bool`): Whether nodes that make other bases are sent those of the server.

    Raises:
        ValueError: if the bases of the adapter are made from the clients' gradients or sent to nodes, or if it has running
            statistics.
    """
    if not args.secure_aggregation:
        return
    if send_bases:
        raise ValueError(
            "`secure_aggregation` does not go with `send_bases`: its messages have no place for them. Give all nodes the same "
            "version of torch, or let `load_model` load an adapter that was saved with `save_projection=True`."
        )
    adapter = LiveAdapter(model)
    if adapter.awaits_gradient:
        raise ValueError(
            "`secure_aggregation` does not go with bases that are made from the clients' gradients in a round 0, which are not "
            "masked. Make them from public data before (`initialize_bases_from_gradient`), or use other bases."
        )
    if adapter.statistics:
        raise ValueError(
            f"`secure_aggregation` does not go with running statistics that clients upload, such as {adapter.statistics[0]!r}: "
            "rounding could make a variance negative. Use a normalisation without them, such as LayerNorm or GroupNorm."
        )


def single_heads(budgets: Mapping[str, float] | None, clients_per_round: int) -> float:
    """
    Args:
        budgets (`Mapping[str, float]`, *optional*): The clients' shares of the heads. By default all heads.
        clients_per_round (`int`): How many clients take part in a round.

    Returns:
        `float`: About which share of the heads exactly one client of a round trains, if they choose at random. The sum
        over the clients then shows the update of this client.
    """
    if not budgets:
        return 0.0
    share = sum(budgets.values()) / len(budgets)
    return clients_per_round * share * (1 - share) ** (clients_per_round - 1)


def warn_of_single_heads(budgets: Mapping[str, float] | None, clients_per_round: int) -> None:
    """
    Warn if many heads are trained by only one client of a round.

    Args:
        budgets (`Mapping[str, float]`, *optional*): The clients' shares of the heads. By default all heads.
        clients_per_round (`int`): How many clients take part in a round.
    """
    share = single_heads(budgets, clients_per_round)
    if share > MAX_SHARE_OF_SINGLE_HEADS:
        logger.warning(
            f"With these `client_budgets`, about {share:.0%} of the heads are trained by only one of {clients_per_round} clients "
            "in a round. `secure_aggregation` does not hide the update of such a head, because the sum has no other. Raise the "
            "budgets, or let more clients take part in a round."
        )
