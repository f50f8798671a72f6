"""What the arguments of a federation must be, as far as that can be told without the model and the data."""

from __future__ import annotations

import math

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from .client_runners import PARALLEL_MODES
from .personal import read_patterns


def check_counts(args: TrainingArguments) -> None:
    """Check what is counted, each by itself and against each other."""
    counts = ("num_rounds", "num_clients", "clients_per_round", "min_clients", "labels_per_client")
    bases = ("bases_clients", "bases_batches", "bases_rank")
    for name in (*counts, "min_successful_clients", "max_round_attempts", *bases):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be 1 or more, got {value!r}.")
    for name in ("bases_warmup_steps", "personalization_steps"):
        if getattr(args, name) < 0:
            raise ValueError(f"`{name}` must be 0 or more, got {getattr(args, name)!r}.")
    if args.client_timeout is not None and not args.client_timeout > 0:
        raise ValueError(f"`client_timeout` must be above 0 seconds, got {args.client_timeout!r}.")
    for name, most in (
        ("clients_per_round", "num_clients"), ("bases_clients", "num_clients"),
        ("min_successful_clients", "clients_per_round"), ("min_successful_clients", "num_clients"),
    ):  # fmt: skip
        value, limit = getattr(args, name), getattr(args, most)
        if limit and value and value > limit:
            raise ValueError(f"`{name}` must not be above `{most}`, got {value} and {limit}.")


def check_sharing(args: TrainingArguments) -> None:
    """Check that nothing is pushed to the Hub that belongs to the clients."""
    if args.push_to_hub and args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"`hub_strategy={args.hub_strategy.value!r}` would upload checkpoints, which have the names of the clients and "
            "the memory of the server, and no parts of clients to go on from. Use 'every_save' or 'end'."
        )


def check_local_training(args: TrainingArguments) -> None:
    """Check what clients do, and read `local_parameters` into a list of expressions."""
    args.local_parameters = read_patterns(args.local_parameters)
    if not 0 <= args.learning_rate < math.inf:
        raise ValueError(f"`learning_rate` must be a number of 0 or more, got {args.learning_rate!r}.")
    if args.max_steps <= 0 and not args.num_train_epochs > 0:
        raise ValueError(
            f"Clients would train nothing: `num_train_epochs` is {args.num_train_epochs!r} and `max_steps` is "
            f"{args.max_steps!r}. Set one of the two above 0; they are those of one client in one round."
        )
    if args.parallel not in PARALLEL_MODES:
        raise ValueError(f"`parallel` must be one of {', '.join(PARALLEL_MODES)}, got {args.parallel!r}.")
    if not args.proximal_mu >= 0:
        raise ValueError(f"`proximal_mu` must be 0 or more, got {args.proximal_mu!r}.")
    if args.scaffold and args.client_budgets is not None:
        raise ValueError(
            "`scaffold` needs the gradients of all heads, which clients with `client_budgets` do not have. Use one of "
            "both, or `proximal_mu`."
        )
