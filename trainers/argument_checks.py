"""Checks of the arguments of a federation that need neither the model nor the data."""

from __future__ import annotations

import math

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.training_args import OptimizerNames
from transformers.utils import is_torch_bf16_gpu_available

from peft_ravan.merging import MERGE_METHODS, get_merge_method
from peft_ravan.merging.privacy import check_plain_mean

from .client.personal import read_patterns
from .runners import PARALLEL_MODES
from .secure_aggregation import MIN_CLIENTS, SecureAggregation
from .server.privacy import Privacy


# by name, since transformers 5.0 does not have the second one
SCHEDULES_OF_METRICS = ("reduce_lr_on_plateau", "greedy")


def choose_precision(args: TrainingArguments) -> None:
    """
    Choose bfloat16 where a GPU has it, if the arguments leave the choice open.

    TRL's do, and then take bfloat16 on any machine, which `TrainingArguments` refuse where it is missing.
    """
    if args.bf16 is None and not args.fp16:
        args.bf16 = not args.use_cpu and is_torch_bf16_gpu_available()


def check_counts(args: TrainingArguments) -> None:
    """Check the arguments that are counts, individually and against each other."""
    counts = ("num_rounds", "num_clients", "clients_per_round", "min_clients", "labels_per_client")
    for name in (*counts, "min_successful_clients", "average_rounds"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be 1 or more, got {value!r}.")
    if args.personalization_steps < 0:
        raise ValueError(f"`personalization_steps` must be 0 or more, got {args.personalization_steps!r}.")
    for name, most in (
        ("clients_per_round", "num_clients"), ("bases_clients", "num_clients"),
        ("min_successful_clients", "clients_per_round"), ("min_successful_clients", "num_clients"),
    ):  # fmt: skip
        value, limit = getattr(args, name), getattr(args, most)
        if limit and value and value > limit:
            raise ValueError(f"`{name}` must not be above `{most}`, got {value} and {limit}.")


def check_combinations(args: TrainingArguments) -> None:
    """
    Check the arguments against each other, and parse `privacy` and `secure_aggregation`.

    Args:
        args ([`~transformers.TrainingArguments`]): The arguments.

    Raises:
        ValueError: if one has an invalid value, or cannot be combined with another one.
        TypeError: if `privacy` or `secure_aggregation` has the wrong type.
    """
    check_sharing(args)
    check_local_training(args)
    check_client_batching(args)
    check_privacy(args)
    check_secure_aggregation(args)


def check_sharing(args: TrainingArguments) -> None:
    """Check that nothing that belongs to the clients is pushed to the Hub."""
    if args.push_to_hub and args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"`hub_strategy={args.hub_strategy.value!r}` would upload checkpoints, which have the names of the clients and "
            "the memory of the server, and no parts of clients to go on from. Use 'every_save' or 'end'."
        )


def check_local_training(args: TrainingArguments) -> None:
    """Check the arguments of the local training, and parse `local_parameters` into a list of expressions."""
    args.local_parameters = read_patterns(args.local_parameters)
    if not 0 <= args.learning_rate < math.inf:
        raise ValueError(f"`learning_rate` must be a number of 0 or more, got {args.learning_rate!r}.")
    if args.task_head_learning_rate is not None and not 0 <= args.task_head_learning_rate < math.inf:
        raise ValueError(
            f"`task_head_learning_rate` must be a number of 0 or more, got {args.task_head_learning_rate!r}."
        )
    if args.lr_scheduler_type.value in SCHEDULES_OF_METRICS:
        raise ValueError(
            f"`lr_scheduler_type={args.lr_scheduler_type.value!r}` follows a metric, which is not supported over rounds. "
            "Use a schedule that does not, such as 'constant', 'linear' or 'cosine'."
        )
    if args.max_steps <= 0 and not args.num_train_epochs > 0:
        raise ValueError(
            f"Clients would train nothing: `num_train_epochs` is {args.num_train_epochs!r} and `max_steps` is "
            f"{args.max_steps!r}. Set one of the two above 0; they are those of one client in one round."
        )
    if args.parallel not in PARALLEL_MODES:
        raise ValueError(f"`parallel` must be one of {', '.join(PARALLEL_MODES)}, got {args.parallel!r}.")
    if not args.proximal_mu >= 0:
        raise ValueError(f"`proximal_mu` must be 0 or more, got {args.proximal_mu!r}.")
    if args.scaffold and args.merge_method is not None and get_merge_method(args.merge_method).restarts:
        raise ValueError(
            f"`scaffold` does not go with merge_method={args.merge_method!r}, which starts A and B anew: the control variates "
            "belong to the old ones. Use `proximal_mu`, or a method that keeps A and B."
        )
    if args.scaffold and args.client_budgets is not None:
        raise ValueError(
            "`scaffold` needs the gradients of the whole adapter, which clients with `client_budgets` do not have. Use one of "
            "both, or `proximal_mu`."
        )


def check_client_batching(args: TrainingArguments) -> None:
    """
    Check that nothing among the arguments keeps clients from being trained at once.

    Args:
        args ([`~transformers.TrainingArguments`]): The arguments.

    Raises:
        ValueError: if `client_batching` is below 1, or does not go with another argument.
    """
    if args.client_batching < 1:
        raise ValueError(f"`client_batching` must be 1 or more, got {args.client_batching!r}.")
    if args.client_batching == 1:
        return
    for name, is_set, why in (
        ("parallel='data'", args.parallel == "data", "all processes train one client together"),
        ("client_timeout", args.client_timeout is not None, "clients would have to wait for each other"),
        ("fp16", args.fp16, "all clients would share one scale of the gradients. Use `bf16`"),
        ("activation_checkpointing", args.activation_checkpointing, "it repeats the forward pass of one client"),
        ("torch_compile", args.torch_compile, "the layers change from client to client"),
        ("use_liger_kernel", args.use_liger_kernel, "its kernels are made for one adapter"),
        ("neftune_noise_alpha", args.neftune_noise_alpha is not None, "its noise depends on the length of one client's texts"),
        ("auto_find_batch_size", args.auto_find_batch_size, "the memory that one client needs is not known"),
        ("deepspeed", args.deepspeed is not None, "it computes the gradients itself"),
        ("fsdp", bool(args.fsdp), "a federation needs the whole model in each process"),
        (f"optim={args.optim.value!r}", _steps_in_backward(args.optim), "it takes its steps while gradients are computed"),
    ):  # fmt: skip
        if is_set:
            raise ValueError(
                f"`client_batching={args.client_batching}` trains several clients at once, and does not go with `{name}`: "
                f"{why}. Leave it out, or set `client_batching=1`."
            )


def _steps_in_backward(optim: OptimizerNames) -> bool:
    return any(kind in optim.value for kind in ("lomo", "layerwise"))


def check_privacy(args: TrainingArguments) -> None:
    """
    Check what can be checked without the clients, and parse `privacy` into a dict.

    Args:
        args ([`~transformers.TrainingArguments`]): The arguments.

    Raises:
        ValueError: if `privacy` has an invalid value, or cannot be combined with other arguments.
        TypeError: if `privacy` has the wrong type.
    """
    if args.privacy is None:
        return
    privacy = Privacy.parse(args.privacy)
    if args.merge_method is not None:
        check_plain_mean(get_merge_method(args.merge_method))
    if args.scaffold:
        raise ValueError(
            "`privacy` does not go with `scaffold`: clients upload control variates then, which are not clipped and get no "
            "noise. Use `proximal_mu` against clients that drift apart."
        )
    if args.merging.limits.is_set:
        raise ValueError(
            "`privacy` does not go with `max_update_norm` and `max_examples`: it clips every update to `clip_norm` and gives "
            "all clients the same weight. Leave them out."
        )
    if args.participation_weights == "examples":
        raise ValueError(
            "`privacy` does not go with `participation_weights='examples'`: participation would reveal how much data "
            "clients have. Give weights by client that may be known, or none."
        )
    if args.min_successful_clients > 1:
        raise ValueError(
            f"`privacy` does not go with min_successful_clients={args.min_successful_clients}: clients may fail "
            "because of their data, and repeating the round with others could reveal something about it. Leave it at "
            "1; a client that fails counts as one that has changed nothing."
        )
    if privacy.secret_sampling and (args.participation_weights is not None or args.clients_per_round is None):
        found = "all take part" if args.clients_per_round is None else "`participation_weights` are given"
        raise ValueError(
            f"`secret_sampling` needs clients that are drawn with equal probability, but {found}. Set "
            "`clients_per_round` and no weights, or leave `secret_sampling` out, so that every client counts as "
            "taking part in every round."
        )
    # a plain JSON value, since arguments are written to checkpoints and logs
    args.privacy = privacy.to_dict()


def check_secure_aggregation(args: TrainingArguments) -> None:
    """
    Check what can be checked without the clients, and parse `secure_aggregation` into a dict.

    Args:
        args ([`~transformers.TrainingArguments`]): The arguments.

    Raises:
        ValueError: if `secure_aggregation` has an invalid value, or cannot be combined with other arguments.
        TypeError: if `secure_aggregation` has the wrong type.
    """
    settings = SecureAggregation.parse(args.secure_aggregation)
    args.secure_aggregation = None if settings is None else settings.to_dict()
    if settings is None:
        return
    if args.merge_method is not None and not get_merge_method(args.merge_method).secure_aggregation:
        able = ", ".join(name for name, method in MERGE_METHODS.items() if method.secure_aggregation)
        raise ValueError(
            f"`secure_aggregation` does not go with merge_method={args.merge_method!r}, which needs the update of each client, "
            f"and the server has only their sum. Choose one of: {able}."
        )
    for name, why in (
        ("privacy", "the server would have to clip the update of each client"),
        ("scaffold", "clients upload control variates then, which are not masked"),
        ("max_update_norm", "the server would have to know the norm of each update"),
        ("eval_clients", "the metrics of each client would reach the server"),
    ):
        if getattr(args, name):
            raise ValueError(f"`secure_aggregation` does not go with `{name}`: {why}. Leave one of the two out.")
    for name in ("num_clients", "clients_per_round"):
        value = getattr(args, name)
        if value is not None and value < MIN_CLIENTS:
            raise ValueError(
                f"`secure_aggregation` needs at least {MIN_CLIENTS} clients in a round, and `{name}` is {value}. Each of two "
                "clients could find the update of the other one from their sum. Let more clients take part."
            )
