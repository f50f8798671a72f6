"""What a run tells of itself to people who did not see it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from peft_ravan.hub import FederationRecord
from peft_ravan.merging import get_merge_method


if TYPE_CHECKING:
    from .federated_trainer import FederatedTrainer


def federation_record(trainer: FederatedTrainer) -> FederationRecord | None:
    """
    Sum up a federation for the adapter's card.

    Args:
        trainer ([`FederatedTrainer`]): The trainer.

    Returns:
        [`~peft_ravan.hub.FederationRecord`]: The facts and the rounds, or `None` if no round has been run.
    """
    history = [record for record in trainer.state.log_history if record.get("round")]
    if not history:
        return None
    args, method = trainer.args, get_merge_method(trainer.merge_method)
    partitions = {
        "iid": "equal random parts",
        "dirichlet": f"labels from a Dirichlet distribution, alpha = {args.partition_alpha}",
        "column": f"by the column {args.partition_column!r}",
    }
    given = isinstance(trainer.train_dataset, Mapping)
    steps = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    batch_size = args.train_batch_size * args.gradient_accumulation_steps
    uploaded = sum(record["upload_bytes"] for record in history)
    facts = {
        "Clients": len(trainer.clients),
        "Clients per round": args.clients_per_round or len(trainer.clients),
        "Data of the clients": "given by client" if given else partitions[args.partition],
        "Rounds": len(history),
        "Local training": f"{steps} of {batch_size} examples, {_optimizer(trainer)}",
        "Learning rate": f"{_learning_rates(trainer)}, {args.lr_scheduler_type.value} over the rounds",
        "Merge method": f"[{method.pretty_name}]({method.reference})",
        "Merge options": {**method.options, **(args.merge_options or {})} or "none",
        "Uploaded": f"{uploaded / 1e6:.2f} MB by all clients",
        "Seed": args.federated_seed,
    }
    return FederationRecord(len(trainer.clients), facts, history)


def _optimizer(trainer: FederatedTrainer) -> str:
    chosen = trainer.optimizer_cls_and_kwargs
    return trainer.args.optim.value if chosen is None else chosen[0].__name__


def _learning_rates(trainer: FederatedTrainer) -> str:
    _, kwargs = trainer.optimizer_cls_and_kwargs or (None, {})
    default = kwargs.get("lr", trainer.args.learning_rate)
    groups = [group for group in kwargs.get("params", []) if isinstance(group, dict)]
    rates = [group.get("lr", default) for group in groups] or [default]
    return " and ".join(f"{rate:g}" for rate in rates) + (" by parameter group" if len(rates) > 1 else "")
