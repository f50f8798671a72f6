from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import SchedulerType, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from peft_ravan.merging import SERVER_OPTIMIZERS, UpdateLimits
from peft_ravan.merging.limits import LARGE_UPDATES

from .argument_checks import check_combinations, check_counts, choose_precision
from .client.faults import FaultSettings
from .compression import DEFAULT_DOWNLOAD_DTYPE, DEFAULT_UPLOAD_DTYPE, ExchangeSettings
from .data.partition import PARTITIONS, PartitionSettings
from .data.partitioner import PartitionerArgumentMixin
from .exchange import HEAD_ALLOCATIONS, HEAD_SELECTIONS
from .parsing import parse_json
from .quantization import SENT_DTYPES
from .runners import PARALLEL_MODES
from .secure_aggregation import MIN_CLIENTS
from .server.budgets import BUDGET_DISTRIBUTIONS, HeadSettings
from .server.merging import MergeSettings
from .server.participation import Participation
from .server.round_zero import BasesSettings


# without a `repr` of its own: that of TrainingArguments hides tokens
@dataclass(repr=False)
class FederatedArgumentsMixin(PartitionerArgumentMixin):
    """
    The federated arguments of a trainer, mixed into [`~transformers.TrainingArguments`] by [`federated_arguments`].

    The inherited arguments (`num_train_epochs` or `max_steps`, `learning_rate`, batch sizes, gradient accumulation, mixed
    precision, ...) apply to the local training of one client in one round. Schedules count rounds: `eval_strategy` and
    `save_strategy` take effect at the end of a round, with `"epoch"` for every round and `"steps"` for every
    `eval_steps` or `save_steps` rounds. `lr_scheduler_type` and `warmup_steps` change the learning rate from round to
    round. It is constant within a round.

    Args:
        num_rounds (`int`, *optional*, defaults to 10):
            The number of rounds.
        num_clients (`int`, *optional*):
            The number of clients to split the training data among. By default 10, or the number of clients in the data
            if it comes by client (`partition="column"`, or a dict of datasets).
        clients_per_round (`int`, *optional*):
            The number of clients that train in a round, drawn anew for each round. By default all that are available.
        participation_weights (`str` or `dict[str, float]`, *optional*):
            How likely each client is to be drawn: `"examples"`, in proportion to its number of examples, or a weight
            for each client by name (0: never). Other strings are read as JSON. By default all are equally likely. With
            `"examples"`, merge methods that weight clients by examples, as most do, count sizes twice: use uniform
            weights instead. `merge_method="trimmed_mean"` with `merge_options={"trim": 0.0}` is the plain mean.
        min_clients (`int`, *optional*, defaults to 1):
            The number of clients that must be available for a round, see `availability` of [`FederatedTrainer`]. A round
            with fewer clients is skipped: it is recorded without clients, and the adapter does not change.
        partition (`str` or `Partitioner`, *optional*, defaults to `"iid"`):
            How one training set is split: `"iid"` (equal random parts), `"dirichlet"` (label proportions drawn from a
            Dirichlet distribution), `"pathological"` (a few labels per client) or `"column"` (one client for each
            value of `partition_column`). It can also be an object with the interface of flwr-datasets' `Partitioner`.
        partition_alpha (`float`, *optional*, defaults to 0.5):
            The concentration of the Dirichlet distribution. The smaller it is, the more the clients differ.
        labels_per_client (`int`, *optional*, defaults to 2):
            The number of labels of each client in the pathological partition.
        partition_column (`str`, *optional*):
            The column with the labels (`"dirichlet"` and `"pathological"`, by default `"label"` or `"labels"`) or with
            the client names (`"column"`).
        merge_method (`str`, *optional*):
            The method that merges the clients' uploads, see [`peft_ravan.merging.merge`]. By default `"ravan"` for a
            Ravan adapter and `"fedavg"` for any other.
        merge_options (`dict[str, Any]`, *optional*):
            The options of the merge method, such as `{"beta": "adaptive"}`. A string is read as JSON.
        server_optimizer (`str`, *optional*):
            The server optimizer that takes a step towards the merged state: `"fedavgm"`, `"fedadam"` or `"fedyogi"`.
        server_optimizer_options (`dict[str, Any]`, *optional*):
            The options of the server optimizer, such as `{"learning_rate": 0.01}`. A string is read as JSON.
        average_rounds (`int`, *optional*):
            Over how many rounds the result is averaged: the model that is evaluated, saved and returned has the mean of
            the merged adapters of the last `average_rounds` rounds. Clients start from the last one. For Ravan it is the
            exact mean of the weights. 1 is the last adapter alone.
            By default the mean over all rounds, in which later rounds weigh more, see [`running_mean`], or the last
            adapter for merge methods on LoRA that decompose the product of A and B anew in every round.
        upload_dtype (`str`, *optional*, defaults to `"int4"`):
            What clients round their uploads to: `"float32"` (nothing is rounded, and tensors have the dtypes of the
            adapter), `"bfloat16"`, `"int8"` or `"int4"`. The changes of a round are rounded, without bias, and in
            `"int8"` and `"int4"` each block of 64 numbers has a scale of its own.
        download_dtype (`str`, *optional*, defaults to `"float32"`):
            What the global state is rounded to for clients, one of the same dtypes. The server keeps it unrounded.
        max_update_norm (`float` or `str`, *optional*):
            The largest norm of a client's change in a round, taken over all tensors together: a number, or a multiple
            of the median over the clients of the round, such as `"3*median"`. With a multiple, all uploads of a round
            are kept until its end. By default there is no limit. See [`~peft_ravan.merging.UpdateLimits`].
        large_updates (`str`, *optional*, defaults to `"clip"`):
            What happens to an update above the limit: `"clip"` scales it down, `"refuse"` leaves the client out.
        max_examples (`int`, *optional*):
            The largest number of examples that a client is weighted with in a mean. By default there is no limit.
        local_parameters (`list[str]` or `str`, *optional*):
            Regular expressions for the checkpoint names of personal parameters, such as `["classifier"]` or
            `["lora_B"]`. They stay with their client and are neither uploaded nor merged. Between its rounds, each
            client keeps its own in `output_dir/client_states`. A string is one expression, or a list as JSON. By
            default none, or those that the merge method leaves with the clients.
        task_head_learning_rate (`float`, *optional*):
            The learning rate of `modules_to_save`, such as a new classification head, which often needs a larger one than
            the adapter. By default `learning_rate`.
        proximal_mu (`float`, *optional*, defaults to 0.0):
            FedProx: how strongly a client is pulled back to the global adapter.
        scaffold (`bool`, *optional*, defaults to `False`):
            SCAFFOLD: correct the clients' gradients with control variates. This doubles the communication. It is
            designed for `optim="sgd"`; with any optimizer, the control variates are means of gradients.
        privacy ([`Privacy`], `dict[str, Any]` or `str`, *optional*):
            Client-level differential privacy, such as `{"clip_norm": 1.0, "target_epsilon": 4.0}`: each client's upload is
            clipped as a whole, and noise is added to the mean, which has uniform weights. See [`Privacy`] for the
            fields. A string is read as JSON. By default none.
        secure_aggregation ([`SecureAggregation`], `dict[str, Any]`, `bool` or `str`, *optional*):
            For a federation over Flower: the server sees only sums over the updates of clients. `True`, or settings such as
            `{"threshold": 0.8}`, see [`SecureAggregation`]. A string is read as JSON. Uploads are masked integers of 32 bits
            then, and `upload_dtype` does not apply. By default none.
        client_timeout (`float`, *optional*):
            The seconds after which a client's local training is aborted, checked after every step. By default never.
        min_successful_clients (`int`, *optional*, defaults to 1):
            How many clients of a round must succeed. Otherwise the round is repeated with other clients. If fewer are
            available for a round, all of them must succeed.
        max_round_attempts (`int`, *optional*, defaults to 3):
            How often a round is attempted before the run ends with an error.
        client_budgets (`float`, `dict[str, float]` or `str`, *optional*):
            The share of the heads of a Ravan adapter that clients can train, or of the rank of LoRA, above 0 and up to
            1: one share for all clients, or a share for each client by name, also as JSON (clients that are not named
            train all of the adapter). Or a distribution that each client's share is drawn from: `"uniform"`, `"bell"`
            (most train about half of the adapter) or `"right_skewed"` (most train little), see
            [`draw_client_budgets`]. With LoRA, clients train the leading ranks, at least one at every target, with the
            scaling alpha / r of the global rank, and the merge method must take different ranks, such as `"hetlora"` or
            `"flexlora"`. By default all of the adapter.
        head_selection (`str`, *optional*, defaults to `"random"`):
            Which heads of a Ravan adapter a client trains in a round if it cannot train all of them: `"random"` ones,
            those with the largest `"weight"` (norm of s*H), or those with the largest `"gradient"` (norm of the gradient
            of H on the batches of the client's first step, which need an additional pass through the model).
        head_allocation (`str`, *optional*, defaults to `"layer"`):
            How a client's budget of heads is spent: `"layer"` trains the same share of heads at every target, and at least one;
            `"global"` trains the best heads over all targets, so a target may get none.
        bases_clients (`int`, *optional*):
            With `init_bases="gradient_svd"`, the number of clients that compute the common bases in round 0, before
            the first round. By default as many as in a round.
        bases_warmup_steps (`int`, *optional*, defaults to 10):
            The number of steps for which each of them first trains only the task head. A model without
            `modules_to_save` has no task head and is not warmed up.
        bases_batches (`int`, *optional*, defaults to 8):
            The number of batches over which each of them averages its gradient, or fewer if it has fewer.
        bases_rank (`int`, *optional*, defaults to 32):
            The number of directions of the mean gradient in the bases of each target, at most `h*r`. The others are
            arbitrary orthonormal directions. A smaller number makes the sketches smaller.
        eval_last (`bool`, *optional*):
            Whether each evaluation also evaluates the last merged adapter, which clients start from, with the prefix
            `eval_last`, where the result is a mean over rounds. By default with `average_rounds` above 1.
        eval_clients (`bool`, *optional*, defaults to `False`):
            Whether each evaluation also evaluates the clients, each on its own data and with its own personal parts,
            see [`FederatedTrainer.evaluate_clients`]. The record of the round then includes the values of
            [`summarize_clients`], such as `eval_clients_worst_decile_accuracy`.
        personalization_steps (`int`, *optional*, defaults to 0):
            The number of steps that each client trains on its own data before it is evaluated. The run is unaffected.
        parallel (`str`, *optional*, defaults to `"clients"`):
            How several processes, as started by `accelerate launch`, share the work: with `"clients"`, each process
            trains different clients of a round; with `"data"`, all processes train each client together, one client
            after the other, as [`~transformers.Trainer`] does.
        client_batching (`int`, *optional*, defaults to 1):
            How many clients each process trains at once, with their batches in one forward pass.
        hub_lora_twin (`bool`, *optional*, defaults to `True`):
            Whether `push_to_hub` also uploads the LoRA twin of a Ravan adapter. It is at the root of the repository, where
            PEFT and vLLM load it, and the Ravan adapter in the folder `ravan`. Without it, that is at the root.
        hub_ravan_at_root (`bool`, *optional*, defaults to `False`):
            Whether the Ravan adapter is at the root of the repository, and its LoRA twin in the folder `lora`.
        federated_seed (`int`, *optional*):
            The seed of the partition, of the clients' budgets and heads, of the participation in each round and of
            each client's local training. By default `seed`.
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
            "help": "How likely each client is drawn: 'examples', or JSON of client -> weight. By default equally. "
            "With 'examples' a merge weighted by examples counts sizes twice; use one with uniform weights."
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
    average_rounds: int | None = field(
        default=None,
        metadata={
            "help": "Number of last rounds over which the result is averaged. By default a weighted mean of all rounds."
        },
    )
    upload_dtype: str = field(
        default=DEFAULT_UPLOAD_DTYPE, metadata={"help": f"What uploads are rounded to: {', '.join(SENT_DTYPES)}."}
    )
    download_dtype: str = field(
        default=DEFAULT_DOWNLOAD_DTYPE, metadata={"help": f"What downloads are rounded to: {', '.join(SENT_DTYPES)}."}
    )
    max_update_norm: float | str | None = field(
        default=None,
        metadata={
            "help": "Largest norm of a client's change: a number, or a multiple of the median, such as '3*median'."
        },
    )
    large_updates: str = field(
        default="clip", metadata={"help": f"What happens to an update above it: {', '.join(LARGE_UPDATES)}."}
    )
    max_examples: int | None = field(
        default=None, metadata={"help": "Largest number of examples a client is weighted with. By default no limit."}
    )
    local_parameters: list[str] | str | None = field(
        default=None, metadata={"help": "Regular expressions for the names of parameters that stay with their client."}
    )
    task_head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of a new task head. By default that of the adapter."}
    )
    proximal_mu: float = field(
        default=0.0, metadata={"help": "FedProx: how strongly a client is pulled back to the global adapter."}
    )
    scaffold: bool = field(
        default=False, metadata={"help": "SCAFFOLD: correct the clients' gradients with control variates."}
    )
    # or a Privacy
    privacy: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Client-level differential privacy, as JSON: clip_norm and noise_multiplier or target_epsilon."
        },
    )
    # or a SecureAggregation, or True
    secure_aggregation: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Over Flower: the server sees only sums of updates. 'true', or settings as JSON."},
    )
    client_timeout: float | None = field(
        default=None, metadata={"help": "Seconds after which a client's local training is aborted. By default never."}
    )
    min_successful_clients: int = field(
        default=1, metadata={"help": "How many clients of a round must succeed, or it is repeated with others."}
    )
    max_round_attempts: int = field(
        default=3, metadata={"help": "How often a round is attempted before the run ends with an error."}
    )
    client_budgets: dict[str, float] | str | float | None = field(
        default=None,
        metadata={
            "help": "Share of Ravan's heads, or of LoRA's rank, that clients can train: a number, JSON by client, or "
            f"drawn from one of {', '.join(BUDGET_DISTRIBUTIONS)}. By default all."
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
        metadata={"help": "Number of clients that compute bases from gradients. By default `clients_per_round`."},
    )
    bases_warmup_steps: int = field(
        default=10, metadata={"help": "Steps on the task head before the gradients for the bases are computed."}
    )
    bases_batches: int = field(default=8, metadata={"help": "Batches of a client's gradient for the bases."})
    bases_rank: int = field(
        default=32, metadata={"help": "Directions of the gradient in the bases of a target, at most `h*r`."}
    )
    eval_last: bool | None = field(
        default=None, metadata={"help": "Whether evaluations also evaluate the last adapter beside a mean of rounds."}
    )
    eval_clients: bool = field(default=False, metadata={"help": "Whether evaluations also evaluate each client."})
    personalization_steps: int = field(
        default=0, metadata={"help": "Steps that a client trains on its own data before it is evaluated."}
    )
    parallel: str = field(
        default="clients", metadata={"help": f"What several processes share: {', '.join(PARALLEL_MODES)}."}
    )
    client_batching: int = field(default=1, metadata={"help": "How many clients are trained at once in a process."})
    hub_lora_twin: bool = field(default=True, metadata={"help": "Whether to push the LoRA twin as well."})
    hub_ravan_at_root: bool = field(
        default=False,
        metadata={"help": "Have the Ravan adapter at the root of the repository, and not its LoRA twin."},
    )
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
        choose_precision(self)
        super().__post_init__()
        if self.federated_seed is None:
            self.federated_seed = self.seed
        check_counts(self)
        for name in ("merge_options", "server_optimizer_options"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, parse_json(name, getattr(self, name)))
        # each of the settings checks itself; plain JSON values, since arguments are written to checkpoints and logs
        self.participation_weights = self.participation.weights
        self.max_update_norm = self.merging.limits.max_update_norm
        self.client_budgets = self.heads.budgets
        _ = self.partition_settings, self.bases, self.faults, self.exchange
        check_combinations(self)

    @property
    def merging(self) -> MergeSettings:
        """How the server merges uploads."""
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
        """How the common bases are computed from gradients."""
        return BasesSettings(self.bases_clients, self.bases_warmup_steps, self.bases_batches, self.bases_rank)

    @property
    def exchange(self) -> ExchangeSettings:
        """How tensors are sent."""
        return ExchangeSettings(self.upload_dtype, self.download_dtype, masked=bool(self.secure_aggregation))

    @property
    def faults(self) -> FaultSettings:
        """How failures of clients are handled."""
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
        """Which clients take part in which round."""
        # in a smaller round, secure aggregation would not hide much
        least = max(self.min_clients, MIN_CLIENTS) if self.secure_aggregation else self.min_clients
        return Participation(
            self.clients_per_round,
            self.participation_weights,
            least,
            self.min_successful_clients,
            self.federated_seed,
        )


@dataclass(repr=False)
class FederatedArguments(FederatedArgumentsMixin, TrainingArguments):
    """
    The arguments of a [`FederatedTrainer`]: those of [`~transformers.TrainingArguments`] and those of
    [`FederatedArgumentsMixin`].
    """
