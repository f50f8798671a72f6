"""
Federated training with `transformers`: rounds of clients that train an adapter, merged by `peft_ravan.merging`.
"""

from typing import Any

from peft_ravan.sharing.federation_record import read_history

from .argument_classes import federated_arguments
from .arguments import FederatedArguments, FederatedArgumentsMixin
from .client.faults import ClientTimeoutError
from .data.client_eval_data import make_client_eval_datasets
from .data.partition import make_clients
from .data.partition_report import partition_table, plot_partition
from .federated_mixin import FederatedMixin
from .federated_trainer import FederatedTrainer, federated
from .files import CheckpointError
from .records.callbacks import FederatedCallback
from .records.client_metrics import client_statistics, summarize_clients
from .records.history import history_table
from .records.history_plot import plot_history
from .run_folder import FolderInUseError
from .secure_aggregation import SecureAggregation
from .server.privacy import Privacy
from .server.rounds import RoundFailedError


__all__ = [
    "CheckpointError",
    "ClientTimeoutError",
    "FederatedArguments",
    "FederatedArgumentsMixin",
    "FederatedCallback",
    "FederatedMixin",
    "FederatedTrainer",
    "FolderInUseError",
    "Privacy",
    "RoundFailedError",
    "SecureAggregation",
    "client_statistics",
    "federated",
    "federated_arguments",
    "history_table",
    "make_client_eval_datasets",
    "make_clients",
    "partition_table",
    "plot_history",
    "plot_partition",
    "read_history",
    "summarize_clients",
]


# not in `__all__`, since trl is optional and takes seconds to import
_OF_TRL = ("FederatedDPOConfig", "FederatedDPOTrainer", "FederatedSFTConfig", "FederatedSFTTrainer")


def __getattr__(name: str) -> Any:
    if name in _OF_TRL:
        from . import trl_trainers

        return getattr(trl_trainers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_OF_TRL])
