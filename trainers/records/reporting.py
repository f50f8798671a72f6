"""What a run tells of itself to people who did not see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft_ravan.merging import get_merge_method, get_server_optimizer
from peft_ravan.sharing.federation_record import FederationRecord, current_versions, public_history

from ..arguments import FederatedArguments
from ..federation import Federation


def federation_record(
    federation: Federation, log_history: Sequence[Mapping[str, Any]], best_round: int | None = None
) -> FederationRecord | None:
    """
    Sum up a federation for the adapter's card.

    Args:
        federation ([`Federation`]): What it is made with.
        log_history (`Sequence[Mapping[str, Any]]`): What was logged.
        best_round (`int`, *optional*): The round that the adapter is of, if it is not the last one.

    Returns:
        [`~peft_ravan.sharing.federation_record.FederationRecord`]: The facts and the rounds, or `None` if no round has been run.
    """
    history = [record for record in log_history if record.get("round")]
    if not history:
        return None
    args, method = federation.args, get_merge_method(federation.merge_method)
    num_clients = len(federation.clients)
    steps = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    batch_size = args.train_batch_size * args.gradient_accumulation_steps
    skipped = sum(not record["clients"] for record in history)
    # with `eval_on_start` alone, round 0 has an evaluation and no clients
    opening = [r for r in log_history if r.get("round") == 0 and "clients" in r]
    uploaded, downloaded = (
        sum(record[name] for record in [*opening, *history]) for name in ("upload_bytes", "download_bytes")
    )
    facts = {
        "Clients": num_clients,
        "Clients per round": args.participation.describe(num_clients),
        "Data of the clients": "given by client"
        if federation.is_given_by_client
        else args.partition_settings.describe(),
        "Rounds": f"{len(history)}, {skipped} of them skipped" if skipped else len(history),
        "Local training": f"{steps} of {batch_size} examples, {_optimizer(federation)}",
        "Learning rate": f"{_learning_rates(federation)}, {args.lr_scheduler_type.value} over the rounds",
        "Merge method": f"[{method.pretty_name}]({method.reference})",
        "Merge options": {**method.options, **(args.merge_options or {})} or "none",
        **_server_optimizer(args),
        **_client_budgets(federation),
        **_privacy(federation, history),
        **_common_bases(opening),
        "Uploaded": f"{uploaded / 1e6:.2f} MB by all clients",
        "Downloaded": f"{downloaded / 1e6:.2f} MB by all clients",
        **_seeds(federation),
    }
    return FederationRecord(
        len(federation.clients),
        facts,
        public_history([*opening, *history]),
        current_versions(),
        best_round=best_round,
    )


def _server_optimizer(args: FederatedArguments) -> dict[str, str]:
    if args.server_optimizer is None:
        return {}
    optimizer = get_server_optimizer(args.server_optimizer)
    options = {**optimizer.options, **(args.server_optimizer_options or {})}
    return {"Server optimizer": f"[{optimizer.pretty_name}]({optimizer.reference}), {options}"}


def _client_budgets(federation: Federation) -> dict[str, str]:
    if federation.client_budgets is None:
        return {}
    args, shares = federation.args, federation.client_budgets.values()
    mean = sum(shares) / len(shares)
    spent = "at every target" if args.head_allocation == "layer" else "over all targets"
    return {
        "Heads a client trains": f"{min(shares):.0%} to {max(shares):.0%} (mean {mean:.0%}), by {args.head_selection}, {spent}"
    }


def _seeds(federation: Federation) -> dict[str, int]:
    args = federation.args
    if _is_secret(federation):
        return {}
    return {"Seed": args.federated_seed} | (
        {} if args.seed == args.federated_seed else {"Seed of the trainer": args.seed}
    )


def _is_secret(federation: Federation) -> bool:
    """Whether the guarantee needs that nobody can work out who took part."""
    return federation.privacy is not None and federation.privacy.privacy.secret_sampling


def _privacy(federation: Federation, history: list[dict[str, Any]]) -> dict[str, str]:
    if federation.privacy is None:
        return {}
    privacy, noisy = federation.privacy.privacy, federation.privacy.round
    counted = "takes part in secret" if _is_secret(federation) else "takes part in every round"
    seed = "the operating system" if privacy.noise_seed is None else "a seed, which must be secret"
    return {
        "Differential privacy": f"ε = {federation.privacy.epsilon(history):.3g} at δ = {privacy.delta:g}, for the data of one "
        f"client being replaced, if it {counted}",
        "Clipping and noise": f"norm {privacy.clip_norm:g} of a whole upload, noise multiplier "
        f"{noisy.noise_multiplier:.4g} from {seed}, uniform weights",
    }


def _common_bases(opening: list[dict[str, Any]]) -> dict[str, str]:
    if not opening:
        return {}
    [record] = opening
    up, down = (f"{record[name] / 1e6:.2f} MB" for name in ("upload_bytes", "download_bytes"))
    return {
        "Bases": f"from gradients of {len(record['clients'])} clients, in a round 0 with {up} of uploads and {down} of downloads"
    }


def _optimizer(federation: Federation) -> str:
    chosen = federation.optimizer
    return federation.args.optim.value if chosen is None else chosen[0].__name__


def _learning_rates(federation: Federation) -> str:
    _, kwargs = federation.optimizer or (None, {})
    default = kwargs.get("lr", federation.args.learning_rate)
    groups = [group for group in kwargs.get("params", []) if isinstance(group, dict)]
    rates = [group.get("lr", default) for group in groups] or [default]
    return " and ".join(f"{rate:g}" for rate in rates) + (" by parameter group" if len(rates) > 1 else "")
