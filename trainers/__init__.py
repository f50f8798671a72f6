"""
Federated training with `transformers`: rounds of clients that train an adapter, merged by `peft_ravan.merging`.
"""

from .arguments import FederatedArguments
from .callbacks import FederatedCallback
from .federated_trainer import FederatedTrainer
from .partition import make_clients


__all__ = ["FederatedArguments", "FederatedCallback", "FederatedTrainer", "make_clients"]
