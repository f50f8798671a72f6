"""
Federated training with `transformers`: rounds of clients that train an adapter, merged by `peft_ravan.merging`.
"""

from .arguments import FederatedArguments
from .callbacks import FederatedCallback
from .checkpoints import CheckpointError
from .faults import ClientTimeoutError, RoundFailedError
from .federated_trainer import FederatedTrainer
from .partition import make_clients
from .partition_report import partition_table, plot_partition


__all__ = [
    "CheckpointError",
    "ClientTimeoutError",
    "FederatedArguments",
    "FederatedCallback",
    "FederatedTrainer",
    "RoundFailedError",
    "make_clients",
    "partition_table",
    "plot_partition",
]
