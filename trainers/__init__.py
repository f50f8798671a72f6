"""
Federated training with `transformers`: rounds of clients that train an adapter, merged by `peft_ravan.merging`.
"""

from .arguments import FederatedArguments
from .callbacks import FederatedCallback
from .checkpoints import CheckpointError
from .faults import ClientTimeoutError, RoundFailedError
from .federated_trainer import FederatedTrainer
from .partition import make_clients


__all__ = [
    "CheckpointError",
    "ClientTimeoutError",
    "FederatedArguments",
    "FederatedCallback",
    "FederatedTrainer",
    "RoundFailedError",
    "make_clients",
]
