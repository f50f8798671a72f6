from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field, make_dataclass
from typing import Any

from transformers import SchedulerType, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from peft_ravan.merging import SERVER_OPTIMIZERS, UpdateLimits
from peft_ravan.merging.limits import LARGE_UPDATES

from .argument_checks import check_counts, check_local_training, check_privacy, check_sharing
from .client.faults import FaultSettings
from .data.partition import PARTITIONS, PartitionSettings
from .data.partitioner import PartitionerArgumentMixin
from .exchange import HEAD_ALLOCATIONS, HEAD_SELECTIONS
from .runners import PARALLEL_MODES
from .server.budgets import BUDGET_DISTRIBUTIONS, HeadSettings
from .server.merging import MergeSettings
from .server.participation import Participation
from .server.round_zero import BasesSettings


# without a `repr` of its own: that of TrainingArguments hides tokens
@dataclass(repr=False)
class FederatedArgumentsMixin(PartitionerArgumentMixin):
    """
    What is federated in the arguments of a trainer, to be mixed over [`~transformers.TrainingArguments`] or a subclass, see
    [`federated_arguments`].

    The inherited arguments (`num_train_epochs` or `max_steps`, `learning_rate`, batch sizes, gradient accumulation, mixed
    precision, ...) govern the local training of one client in one round. What counts time counts rounds: `eval_strategy`
    and `save_strategy` act after a round, `"epoch"` means every round and `"steps"` every `eval_steps` or `save_steps`
    rounds, and `lr_scheduler_type`, `warmup_steps` act over the rounds, while the rate within a round is constant.

    Args:
        num_rounds (`int`, *optional*, defaults to 10):
            The number of rounds.
        num_clients (`int`, *optional*):
            The number of clients the training data is split among. By default 10, or the number of clients that there
            are, if the data comes by client (`partition="column"`, or a dict of datasets).
        clients_per_round (`int`, *optional*):
            The number of clients that train in a round, drawn anew in every round. By default all, and never more than
            are available.
        participation_weights (`str` or `dict[str, float]`, *optional*):
            How likely each client is to be drawn: `"examples"`, in proportion to its number of examples, or a weight for
            each client by its name (0: never). A string other than `"examples"` is read as JSON. By default all are
            equally likely. With `"examples"` a merge weighted by examples, as most are, counts sizes twice: use one with
            uniform weights then. `merge_method="trimmed_mean"` with `merge_options={"trim": 0.0}` is the plain mean.
        min_clients (`int`, *optional*, defaults to 1):
            The number of clients that must be available for a round, see `availability` of [`FederatedTrainer`]. A round
            with fewer is skipped: it is recorded without clients, and the adapter stays as it is.
        partition (`str` or `Partitioner`, *optional*, defaults to `"iid"`):
            How one training set is split: `"iid"` (equal random parts), `"dirichlet"` (the labels of each client from a
            Dirichlet distribution), `"pathological"` (a few labels each) or `"column"` (one client for each value of
            `partition_column`); or an object with the interface of flwr-datasets' `Partitioner`.
        partition_alpha (`float`, *optional*, defaults to 0.5):
            The concentration of the Dirichlet distribution: the smaller, the more the clients differ.
        labels_per_client (`int`, *optional*, defaults to 2):
            The number of labels of each client in the pathological partition.
        partition_column (`str`, *optional*):
            The column with the labels (`"dirichlet"` and `"pathological"`, by default `"label"` or `"labels"`) or the
            clients (`"column"`).
        merge_method (`str`, *optional*):
            The method that merges what the clients upload, see [`peft_ravan.merging.merge`]. By default `"ravan"` for a
            Ravan adapter and `"fedavg"` for any other.
        merge_options (`dict[str, Any]`, *optional*):
            The options of the merge method, such as `{"beta": "adaptive"}`. A string is read as JSON.
        server_optimizer (`str`, *optional*):
            The server optimizer that takes a step towards what was merged: `"fedavgm"`, `"fedadam"` or `"fedyogi"`.
        server_optimizer_options (`dict[str, Any]`, *optional*):
            The options of the server optimizer, such as `{"learning_rate": 0.01}`. A string is read as JSON.
        max_update_norm (`float` or `str`, *optional*):
            The largest norm of what a client changes in a round, over all tensors together: a number, or a multiple of the
            median over the clients of the round, such as `"3*median"`, for which all uploads of a round are kept until its
            end. By default any. See [`~peft_ravan.merging.UpdateLimits`].
        large_updates (`str`, *optional*, defaults to `"clip"`):
            What happens to an update that goes further: `"clip"` scales it down, `"refuse"` leaves the client out.
        max_examples (`int`, *optional*):
            The largest number of examples that a client counts with in a mean. By default what it has.
        local_parameters (`list[str]` or `str`, *optional*):
            Regular expressions for the checkpoint names of what stays with its client and is neither uploaded nor merged,
            such as `["classifier"]` or `["lora_B"]`. Each client keeps its own between its rounds, in
            `output_dir/client_states`. A string is one expression, or a list as JSON. By default nothing, or what the
            merge method leaves with the clients.
        proximal_mu (`float`, *optional*, defaults to 0.0):
            FedProx: how strongly a client is pulled back to the global adapter.
        scaffold (`bool`, *optional*, defaults to `False`):
            SCAFFOLD: correct the clients' gradients by control variates, which doubles what is sent. It is made for
            `optim="sgd"`; the control variates are means of gradients, whatever the optimizer.
        privacy ([`Privacy`], `dict[str, Any]` or `str`, *optional*):
            Client-level differential privacy, such as `{"clip_norm": 1.0, "target_epsilon": 4.0}`: each client's upload is
            clipped as a whole, and noise is added to the mean, which has uniform weights. See [`Privacy`] for the fields; a
            string is read as JSON. By default none.
        client_timeout (`float`, *optional*):
            The seconds after which a client's local training is given up, looked at after every step. By default never.
        min_successful_clients (`int`, *optional*, defaults to 1):
            How many clients of a round must succeed, else it is repeated with others; all of them in a round for which
            fewer are available.
        max_round_attempts (`int`, *optional*, defaults to 3):
            How often a round is tried before the run ends with an error.
        client_budgets (`float`, `dict[str, float]` or `str`, *optional*):
            The share of the heads of a Ravan adapter that clients can train, above 0 and up to 1: for all clients, or by
            the name of the client (who is not named trains all heads), also as JSON. Or the name of a distribution that
            each client's share is drawn from: `"uniform"`, `"bell"` (most can train about half of the heads) or
            `"right_skewed"` (most can train few), see [`draw_client_budgets`]. By default all heads.
        head_selection (`str`, *optional*, defaults to `"random"`):
            Which heads a client trains in a round, if it cannot train all: `"random"` ones, those with the largest
            `"weight"` (norm of s*H), or with the largest `"gradient"` (norm of the gradient of H on the batches of the
            client's first step, which are passed once more through the model for this).
        head_allocation (`str`, *optional*, defaults to `"layer"`):
            How a client's budget is spent: `"layer"` trains the same share of heads, at least one, at every target;
            `"global"` the best heads of all targets together, so that a target may get none.
        bases_clients (`int`, *optional*):
            With `init_bases="gradient_svd"`, how many clients make the common bases in round 0, before the first round.
            By default as many as in a round.
        bases_warmup_steps (`int`, *optional*, defaults to 10):
            How many steps each of them trains the task head first, and nothing else. A model without `modules_to_save`
            has none, and is not warmed up.
        bases_batches (`int`, *optional*, defaults to 8):
            Over how many batches each of them takes its mean gradient, or fewer if it has not that many.
        bases_rank (`int`, *optional*):
            How many directions of the mean gradient the bases have at each target, at most the `h*r` that there are and by
            default all. The others are any orthonormal ones. Fewer make the sketches that are uploaded smaller.
        eval_clients (`bool`, *optional*, defaults to `False`):
            Whether each evaluation evaluates the clients, too, each on its own data and with its own personal parts, see
            [`FederatedTrainer.evaluate_clients`]. The record of the round then has what [`summarize_clients`] gives, such
            as `eval_clients_worst_decile_accuracy`.
        personalization_steps (`int`, *optional*, defaults to 0):
            For how many steps each client trains on its own data before it is evaluated. The run does not change by it.
        parallel (`str`, *optional*, defaults to `"clients"`):
            What several processes, as `accelerate launch` starts them, share: `"clients"`, each trains other clients of a
            round, or `"data"`, all train one client after the other together, as [`~transformers.Trainer`] does.
        hub_lora_twin (`bool`, *optional*, defaults to `True`):
            Whether `push_to_hub` uploads the LoRA twin of a Ravan adapter, too, in the folder `lora`.
        federated_seed (`int`, *optional*):
            The seed of the partition, of the clients' budgets and heads, of who takes part in each round and of each
            client's local training. By default `seed`.
    """

    num_rounds: int = field(default=10, metadata={"help": "Number of rounds."})
    num_clients: int | None = field(
        default=None, metadata={"help": "Number of clients to split the training data among. By default 10."}
    )
    clients_per_round: int | None = field(
        default=None, metadata={"help": "Number of clients that train in a round. By default all."}
    )
    participation_weights: dict[str, float] | str | None = field(
        default=None,
        metadata={
            "help": "How likely each client is drawn: 'examples', or JSON of client -> weight. By default equally. With "
            "'examples' a merge weighted by examples counts sizes twice; use one with uniform weights."
        },
    )
    min_clients: int = field(
        default=1, metadata={"help": "Number of clients that must be available; a round with fewer is skipped."}
    )
    # or a Partitioner, which a command line cannot name
    partition: str = field(
        default="iid", metadata={"help": f"How the training data is split among clients: {', '.join(PARTITIONS)}."}
    )
    partition_alpha: float = field(default=0.5, metadata={"help": "Concentration of the Dirichlet partition."})
    labels_per_client: int = field(default=2, metadata={"help": "Labels of a client in the pathological partition."})
    partition_column: str | None = field(
        default=None, metadata={"help": "Column with the labels (dirichlet, pathological) or the clients (column)."}
    )
    merge_method: str | None = field(
        default=None, metadata={"help": "Merge method. By default 'ravan' for Ravan adapters, else 'fedavg'."}
    )
    merge_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the merge method, as JSON."}
    )
    server_optimizer: str | None = field(
        default=None, metadata={"help": f"Server optimizer: {', '.join(SERVER_OPTIMIZERS)}. By default none."}
    )
    server_optimizer_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the server optimizer, as JSON."}
    )
    max_update_norm: float | str | None = field(
        default=None,
        metadata={
            "help": "Largest norm of what a client changes: a number, or a multiple of the median as '3*median'."
        },
    )
    large_updates: str = field(
        default="clip", metadata={"help": f"What happens to a larger update: {', '.join(LARGE_UPDATES)}."}
    )
    max_examples: int | None = field(
        default=None, metadata={"help": "Largest number of examples that a client counts with. By default any."}
    )
    local_parameters: list[str] | str | None = field(
        default=None, metadata={"help": "Regular expressions for the names of what stays with its client."}
    )
    proximal_mu: float = field(
        default=0.0, metadata={"help": "FedProx: how strongly a client is pulled back to the global adapter."}
    )
    scaffold: bool = field(
        default=False, metadata={"help": "SCAFFOLD: correct the clients' gradients by control variates."}
    )
    # or a Privacy
    privacy: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Client-level differential privacy, as JSON: clip_norm and noise_multiplier or target_epsilon."
        },
    )
    client_timeout: float | None = field(
        default=None, metadata={"help": "Seconds after which a client's local training is given up. By default never."}
    )
    min_successful_clients: int = field(
        default=1, metadata={"help": "How many clients of a round must succeed, else it is repeated with others."}
    )
    max_round_attempts: int = field(
        default=3, metadata={"help": "How often a round is tried before the run ends with an error."}
    )
    client_budgets: dict[str, float] | str | float | None = field(
        default=None,
        metadata={
            "help": "Share of the heads that clients can train, as a number, as JSON by client, or drawn from one of "
            f"{', '.join(BUDGET_DISTRIBUTIONS)}. By default all heads."
        },
    )
    head_selection: str = field(
        default="random",
        metadata={"help": f"Which heads a client with a budget trains: {', '.join(HEAD_SELECTIONS)}."},
    )
    head_allocation: str = field(
        default="layer",
        metadata={"help": f"How the budget of a client is spent: {', '.join(HEAD_ALLOCATIONS)}."},
    )
    bases_clients: int | None = field(
        default=None,
        metadata={"help": "Number of clients that make bases from gradients. By default `clients_per_round`."},
    )
    bases_warmup_steps: int = field(
        default=10, metadata={"help": "Steps on the task head before gradients are taken for the bases."}
    )
    bases_batches: int = field(default=8, metadata={"help": "Batches of a client's gradient for the bases."})
    bases_rank: int | None = field(
        default=None,
        metadata={"help": "Directions of the gradient that bases have at a target. By default all `h*r`."},
    )
    eval_clients: bool = field(default=False, metadata={"help": "Whether evaluations evaluate each client, too."})
    personalization_steps: int = field(
        default=0, metadata={"help": "Steps that a client trains on its own data before it is evaluated."}
    )
    parallel: str = field(
        default="clients", metadata={"help": f"What several processes share: {', '.join(PARALLEL_MODES)}."}
    )
    hub_lora_twin: bool = field(default=True, metadata={"help": "Whether to push the LoRA twin, too."})
    federated_seed: int | None = field(
        default=None, metadata={"help": "Seed of partition, participation and local training. By default `seed`."}
    )
    save_strategy: SaveStrategy | str = field(
        default="epoch", metadata={"help": "When to save a checkpoint to resume from. By default after every round."}
    )
    lr_scheduler_type: SchedulerType | str = field(
        default="constant", metadata={"help": "How the learning rate changes from round to round."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.federated_seed is None:
            self.federated_seed = self.seed
        check_counts(self)
        for name in ("merge_options", "server_optimizer_options"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, _parse_json(name, getattr(self, name)))
        # each of the settings checks itself; as JSON has them: the arguments are written into checkpoints and logs
        self.participation_weights = self.participation.weights
        self.max_update_norm = self.merging.limits.max_update_norm
        self.client_budgets = self.heads.budgets
        _ = self.partition_settings, self.bases, self.faults
        check_sharing(self)
        check_local_training(self)
        check_privacy(self)
        if self.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
            raise ValueError(
                f"`lr_scheduler_type={self.lr_scheduler_type.value!r}` follows a metric, which is not supported over rounds. "
                "Use a schedule of time, such as 'constant', 'linear' or 'cosine'."
            )

    @property
    def merging(self) -> MergeSettings:
        """What the server does with uploads."""
        return MergeSettings(
            self.merge_method,
            self.merge_options or {},
            self.server_optimizer,
            self.server_optimizer_options or {},
            UpdateLimits(self.max_update_norm, self.large_updates, self.max_examples),
        )

    @property
    def heads(self) -> HeadSettings:
        """Which heads clients train."""
        return HeadSettings(self.client_budgets, self.head_selection, self.head_allocation)

    @property
    def bases(self) -> BasesSettings:
        """How common bases are made from gradients."""
        return BasesSettings(self.bases_clients, self.bases_warmup_steps, self.bases_batches, self.bases_rank)

    @property
    def faults(self) -> FaultSettings:
        """What is done about clients that fail."""
        return FaultSettings(self.client_timeout, self.max_round_attempts)

    @property
    def partition_settings(self) -> PartitionSettings:
        """How one training set is split."""
        return PartitionSettings(
            self.partition,
            self.partition_alpha,
            self.labels_per_client,
            self.partition_column,
            self.num_clients,
            self.federated_seed,
        )

    @property
    def participation(self) -> Participation:
        """Who takes part in which round."""
        return Participation(
            self.clients_per_round,
            self.participation_weights,
            self.min_clients,
            self.min_successful_clients,
            self.federated_seed,
        )


@dataclass(repr=False)
class FederatedArguments(FederatedArgumentsMixin, TrainingArguments):
    """
    The arguments of a [`FederatedTrainer`]: those of [`~transformers.TrainingArguments`], and those of
    [`FederatedArgumentsMixin`], which are described there.
    """


@functools.cache
def federated_arguments(arguments_class: type[TrainingArguments]) -> type[TrainingArguments]:
    """
    Make the arguments of a trainer made by [`federated`].

    Args:
        arguments_class (`type[TrainingArguments]`): The arguments that the trainer takes by itself.

    Returns:
        `type[TrainingArguments]`: A subclass with the fields of [`FederatedArgumentsMixin`] besides; the same for the same
        class. `save_strategy` and `lr_scheduler_type` have the defaults of [`FederatedArguments`], all else those of the
        given class.

    Raises:
        TypeError: if it is not a subclass of [`~transformers.TrainingArguments`].
    """
    if not (isinstance(arguments_class, type) and issubclass(arguments_class, TrainingArguments)):
        raise TypeError(
            f"`federated_arguments` needs `TrainingArguments` or a subclass, got {arguments_class!r}. Pass the class that "
            "the arguments of your trainer have."
        )
    if issubclass(arguments_class, FederatedArgumentsMixin):
        return arguments_class
    if arguments_class is TrainingArguments:
        return FederatedArguments
    doc = f"[`{arguments_class.__name__}`] with what is federated, see [`FederatedArgumentsMixin`]."
    return make_dataclass(
        f"Federated{arguments_class.__name__}",
        [],
        bases=(FederatedArgumentsMixin, arguments_class),
        namespace={"__doc__": doc, "__reduce__": _reduce, "__module__": arguments_class.__module__},
        repr=False,
    )


def _parse_json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"`{name}` must be JSON where it is a text, got {text!r}: {error}.") from error


def _reduce(args: TrainingArguments) -> tuple:
    # Trainer saves its arguments by pickle, which finds a class only where it was written down
    [_, arguments_class] = type(args).__bases__
    return _restored, (arguments_class, args.__getstate__())


def _restored(arguments_class: type[TrainingArguments], state: dict[str, Any]) -> TrainingArguments:
    args = object.__new__(federated_arguments(arguments_class))
    args.__dict__.update(state)
    return args
